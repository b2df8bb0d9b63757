"""`jacobian_check`: the learned response against networks retrained at shifted hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optree
import torch

from bilevel.checkpoint import copy
from bilevel.inner import Inner
from bilevel.inner_loop import Steps
from bilevel.result import Result
from bilevel.self_tuning.algorithm import SelfTuning
from bilevel.self_tuning.response import response_model
from hypergrad.tree import Tree, trainable_leaves

__all__ = ["ResponseCheck", "jacobian_check"]


@dataclass(frozen=True)
class ResponseCheck:
    """How one column of the response compares with retraining.

    Attributes:
        cosine: between Θ e and the retrained (w(λ + δe) - w(λ - δe)) / 2δ.
        ratio: norm of the first over norm of the second.
        slope: dL_V/dλ by the response.
        retrained_slope: (L_V(w(λ + δe)) - L_V(w(λ - δe))) / 2δ of the retrained weights.
    """

    cosine: float
    ratio: float
    slope: float
    retrained_slope: float


def jacobian_check(
    inner: Inner,
    algorithm: SelfTuning,
    found: Result | Mapping[str, Any],
    *,
    steps: int = 200,
    delta: float = 0.5,
) -> dict[str, ResponseCheck]:
    """Compare the response with a finite difference of retrained weights.

    For each column of λ, two copies of the inner level go on for `steps` steps from the current
    weights at λ ± δ, on the same batches.  Retraining shows what those steps change, so slow
    directions look flatter than the true best response.  The inner level is left as it was.

    Args:
        inner: the inner level that was tuned, at the weights to check.
        algorithm: that tuned it.
        found: the result of `tune`, or the algorithm's state.
        steps: of retraining.
        delta: δ, in the unconstrained coordinate.

    Returns:
        A `ResponseCheck` by name, ``name[i]`` for an element of a tensor.

    Raises:
        ValueError: steps or delta not positive.
        Diverged: retraining diverged.
    """
    if steps < 1 or not delta > 0:
        raise ValueError(f"jacobian_check: steps and delta must be positive, got {steps}, {delta}.")
    state = found.state["run"]["algorithm"] if isinstance(found, Result) else found
    model, saved = response_model(inner), copy(inner.state_dict())
    z, weights = state["z"], state["weights"]
    names, sizes = weights["names"], weights["shapes"]
    pieces = weights["response"].split([torch.Size(s).numel() for s in sizes])
    response = {n: p.view(s) for n, p, s in zip(names, pieces, sizes, strict=True)}
    general: Tree = inner.params
    if algorithm.mode == "stn":
        leaves = trainable_leaves(inner.params)
        general = leaves.rebuild(
            [p.view(t.shape) for p, t in zip(
                weights["general"].split([t.numel() for t in leaves.tensors]),
                leaves.tensors, strict=True,
            )]
        )  # fmt: skip

    def flat(tree: Tree) -> torch.Tensor:
        return torch.cat([t.detach().reshape(-1) for t in optree.tree_leaves(tree)])

    def retrained(point: torch.Tensor) -> tuple[torch.Tensor, float]:
        inner.load_state_dict(copy(saved))
        inner.set_hparams(inner.space.constrain(model.layout.split(point)))
        Steps(steps).train(inner)
        loss = inner.problem.outer_loss(inner.params, inner.hparams, inner.outer_batch())
        return flat(inner.params), float(loss.detach())

    def predicted(point: torch.Tensor) -> tuple[torch.Tensor, float]:
        inner.load_state_dict(copy(saved))
        shift = point - z if algorithm.mode == "delta" else point
        at = model.effective(general, response, shift)
        loss = inner.problem.outer_loss(at, inner.hparams, inner.outer_batch())
        return flat(at), float(loss.detach())

    checks = {}
    for name, columns in model.layout.columns.items():
        for i in range(columns.start, columns.stop):
            step = torch.zeros_like(z)
            step[i] = delta
            ends = []
            for f in (predicted, retrained):
                up, down = f(z + step), f(z - step)
                ends.append(((up[0] - down[0]) / (2 * delta), (up[1] - down[1]) / (2 * delta)))
            (ours, slope), (truth, true_slope) = ends
            single = columns.stop - columns.start == 1
            checks[name if single else f"{name}[{i - columns.start}]"] = ResponseCheck(
                cosine=float(torch.cosine_similarity(ours, truth, dim=0)),
                ratio=float(ours.norm() / truth.norm()),
                slope=slope,
                retrained_slope=true_slope,
            )
    inner.load_state_dict(saved)
    return checks
