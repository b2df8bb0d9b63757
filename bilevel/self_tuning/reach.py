"""Which hyperparameters the training loss depends on: the only ones with a best response."""

from __future__ import annotations

import optree
import torch
from torch import Tensor

from bilevel.inner import Inner
from bilevel.self_tuning.response import ResponseModel
from bilevel.self_tuning.weights import hyper_names

__all__ = ["check_reach"]

FAR = 3.0
"""How far each coordinate is moved to see whether the training loss changes."""


def check_reach(inner: Inner, model: ResponseModel, z: Tensor) -> None:
    """Check that each hyperparameter changes the training loss of a batch.

    The loss is evaluated at z and with the coordinates of one name moved by ±3, weights, batch and
    random draws the same.  The weights are moved a little at random: at w = 0, where training may
    start, a penalty on them changes nothing.  Inner level and random state are left as they were.

    Raises:
        ValueError: naming what the loss does not depend on.
    """
    tuned = [n for n in model.layout.domains if n in hyper_names(inner.optimizer)]
    if tuned:
        raise ValueError(f"{tuned[0]!r} is a hyperparameter of the optimizer. {_REASON}")
    saved = inner.state_dict()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            unused = _unused(inner, model, z)
    finally:
        inner.load_state_dict(saved)
    if unused:
        raise ValueError(f"the training loss does not depend on {unused[0]!r}. {_REASON}")


def _unused(inner: Inner, model: ResponseModel, z: Tensor) -> list[str]:
    """Return names that leave the loss of a batch as it is."""
    batch, _ = model.draw()
    params = optree.tree_map(
        lambda w: w + 0.1 * torch.randn(w.shape).to(w) if w.requires_grad else w, inner.params
    )
    start = torch.get_rng_state()

    def loss(coordinates: Tensor) -> Tensor:
        torch.set_rng_state(start)
        return model.training_loss(params, None, None, coordinates, batch)

    base, found = loss(z), []
    for name, columns in model.layout.columns.items():
        moved = []
        ones = torch.ones_like(z[columns])
        # A common shift may change nothing, as that of a softmax.
        turns = torch.where(torch.arange(len(ones), device=z.device) % 2 == 0, FAR, -FAR).to(z)
        for step in (FAR * ones, -FAR * ones, turns):
            point = z.clone()
            point[columns] += step
            moved.append(loss(point))
        if name not in model.elsewhere and all(torch.equal(base, value) for value in moved):
            found.append(name)
    return found


_REASON = (
    "Self-tuning learns how the best weights respond to what enters the training loss; to learning "
    "rates, architecture sizes and unused names they do not respond.  Give it to the sampler with "
    "space.own(NAME='sampler'), fix it with space.fix(NAME=value), or tune learning rates with "
    "Descent(Unrolled(...))."
)
