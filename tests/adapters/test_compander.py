"""The compander as a learner: starts, sharing, decay, what moves α and γ, and who may tune them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import Trainer, registry, tasks
from adapters.networks import MLP
from bilevel import MAID, Budget, Descent, ProblemInner, SelfTuning, Space, tune
from bilevel.compander import WeightCompander, bound, compand, companders
from bilevel.compander_training import squared_norm
from bilevel.domains import Grad
from hypergrad import SGD, Estimator, Explicit, Identity, Implicit, Neumann, Problem, Unrolled

TASK = tasks.get("digits", noise=0.2, n_train=100, n_val=100)
KIND = registry.get("compander")


def learner(space: Space | None = None, **hparams: Any) -> Trainer:
    made = KIND(space)
    assert isinstance(made, Trainer)
    made.setup(TASK.to(torch.float64), {"width": 16, **hparams}, seed=0)
    return made


@pytest.mark.parametrize("owner", ["grad", "sampler"])
@pytest.mark.parametrize("sharing", ["layer", "shared"])
def test_a_matched_start_is_the_plain_network_at_the_given_bound(owner: str, sharing: str) -> None:
    """The inverse is taken at the run's own α and γ, so that nothing is lost at the start."""
    space = KIND.space.own(amplitude=owner, gamma=owner)
    given: dict[str, Any] = {"amplitude": 3.7, "gamma": 1.3, "sharing": sharing}
    if owner == "grad" and sharing == "layer":
        given["amplitude"] = torch.tensor([3.0, 3.7, 5.0])
    plain = learner(space, start="plain", amplitude=3.0)
    matched = learner(space, start="matched", **given)
    latent = plain.params["layers.0.parametrizations.weight.original"]
    x = TASK.split("val")["x"].double()
    reference = MLP((1, 8, 8), 10, width=16).double()
    with torch.no_grad():  # a plain start's latent weights are the initial weights of both
        for i, layer in enumerate(reference.layers):
            layer.weight.copy_(plain.params[f"layers.{i}.parametrizations.weight.original"])  # type: ignore[operator]
            layer.bias.copy_(plain.params[f"layers.{i}.bias"])  # type: ignore[operator]
        assert torch.allclose(matched.module()(x), reference(x), atol=1e-6)
    assert not torch.allclose(
        latent, matched.params["layers.0.parametrizations.weight.original"], atol=1e-3
    )
    shape = () if sharing == "shared" else (3,)
    assert owner == "sampler" or matched.hparams["gamma"].shape == shape


def test_training_moves_the_bounds_where_it_is_asked_to() -> None:
    one = learner(learned_on="training", amplitude=1.5, gamma=1.5, sharing="shared")
    assert set(one.hparams) == {"weight_decay"}
    (log,) = [n for n in one.params if n.endswith("log_a")]
    assert float(one.params[log].detach().exp()) == pytest.approx(1.5)
    for _ in range(5):
        one.step()
    assert float(one.params[log].detach().exp()) != pytest.approx(1.5, abs=1e-6)
    assert one.module()(TASK.split("val")["x"].double()).isfinite().all()
    kept = learner()
    for _ in range(5):
        kept.step()
    assert torch.equal(kept.hparams["gamma"], torch.full((3,), 2.0, dtype=torch.float64))


def test_what_decays() -> None:
    """½ λ Σ v² by default, ½ λ Σ w² on request; biases never."""
    batch = {"x": TASK.split("train")["x"].double(), "y": TASK.split("train")["y"]}
    batch |= {"index": torch.arange(100), "seed": 0, "step": 0, "phase": "train"}
    for of in ("latent", "effective"):
        one = learner(decay_of=of)
        losses = []
        for decay in (0.01, 0.05):
            one.set_hparams({"weight_decay": torch.tensor(decay)})
            losses.append(float(one.problem.inner_loss(one.params, one.hparams, batch).detach()))
        model = MLP((1, 8, 8), 10, width=16).double()
        with torch.no_grad():
            for i, layer in enumerate(model.layers):
                layer.weight.copy_(one.params[f"layers.{i}.parametrizations.weight.original"])  # type: ignore[operator]
        compand(model, WeightCompander())
        expected = 0.5 * 0.04 * float(squared_norm(model, of).detach())  # type: ignore[arg-type]
        assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    "estimator",
    [Explicit(), Implicit(Identity(0.02)), Implicit(Neumann(3)), Unrolled(steps=3)],
    ids=lambda e: type(e).__name__,
)
def test_every_hypergradient_moves_bounds_and_resumes(
    estimator: Estimator[Any], tmp_path: Path
) -> None:
    """Interrupted and resumed, a tuned run gives the same bits."""
    space = KIND.space.own(weight_decay="sampler")
    algorithm = Descent(estimator, inner_steps=0 if estimator.steps else 3)
    whole = tune(learner(space), algorithm, Budget(outer_steps=6))
    tune(learner(space), algorithm, Budget(outer_steps=3), checkpoint=tmp_path / "run.pt")
    again = tune(learner(space), algorithm, Budget(outer_steps=6), resume=tmp_path / "run.pt")
    for name in ("amplitude", "gamma"):
        assert torch.equal(again.hparams[name], whole.hparams[name])
        assert not torch.allclose(whole.hparams[name], torch.full((3,), 2.0).double(), atol=1e-4)
    assert whole.test == again.test


def test_self_tuning_moves_the_slopes() -> None:
    space = KIND.space.own(weight_decay="sampler", amplitude="sampler")
    result = tune(learner(space), SelfTuning(lr=0.05), 30)
    assert result.hparams["gamma"].isfinite().all()
    assert not torch.equal(result.hparams["gamma"], torch.full((3,), 2.0, dtype=torch.float64))


def test_maid_lowers_the_outer_loss_by_bounds_and_decay() -> None:
    """A companded linear model, solved anew for each value: every accepted step descends.

    Bounds this wide leave the loss strongly convex in v, as MAID demands.
    """
    generator = torch.Generator().manual_seed(0)
    x, xv = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (20, 40))
    true = torch.tensor([[1.0, -1.0, 0.5, 0.0, 0.0, 0.0]], dtype=torch.float64)
    y, yv = (
        rows @ true.T + torch.randn(len(rows), 1, generator=generator, dtype=torch.float64)
        for rows in (x, xv)
    )
    torch.manual_seed(0)
    net = MLP((6,), 1, depth=0).double()
    compand(net, WeightCompander())

    class Run(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, h: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            a = h["amplitude"].reshape(1)
            with bound(self.net, a, a / h["gamma"]):
                fit = (self.net(batch[0]) - batch[1]).square().mean()
            return torch.stack([fit, squared_norm(self.net)])

    run = Run()

    def parts(params: dict[str, Tensor], h: dict[str, Tensor], batch: Any) -> Tensor:
        named = {f"net.{name}": value for name, value in params.items()}
        found: Tensor = torch.func.functional_call(run, named, (h, batch))
        return found

    def inner(params: dict[str, Tensor], h: dict[str, Tensor], batch: Any) -> Tensor:
        fit, square = parts(params, h, batch)
        bias = params["layers.0.bias"].square().sum()
        return fit + h["decay"] * (square + bias)

    assert len(companders(net)) == 1
    space = Space(
        amplitude=Grad(20.0, low=10.0, high=50.0, scale="log"),
        gamma=Grad(1.0, low=0.5, high=2.0, scale="log"),
        decay=Grad(2.0, low=0.05, high=10.0, scale="log"),
    )
    level = ProblemInner(
        Problem(inner, lambda p, h, b: parts(p, h, b)[0]),
        {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()},
        optimizer=SGD(lr=0.1),
        space=space,
        inner_batch=(x, y),
        outer_batch=(xv, yv),
    )
    found = tune(level, MAID(descent_test="off"), Budget(outer_steps=8))
    losses = [float(row["outer_loss"]) for row in found.trace]  # type: ignore[arg-type]
    assert losses[-1] < 0.95 * losses[0]
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(losses))
