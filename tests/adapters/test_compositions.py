"""Core methods together: with each other, over adapters, and tuned by the outer algorithms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapters import Trainer, registry, tasks
from adapters.reparam import attach, maps
from adapters.weights import LoRA
from bilevel import Descent, SelfTuning, tune
from bilevel.adawac import SaddleWeights
from bilevel.balanced_ema import BalancedEMA, Fixed
from bilevel.compander import WeightCompander, compand, companders
from bilevel.diffora import DifferentialSearch
from bilevel.reweighting import Reweighter
from hypergrad import Unrolled

D = torch.float64
TASK = tasks.get("digits", n_train=100, n_val=100)


def test_saddle_and_loss_weights_refuse_each_others_averages() -> None:
    """Both need one loss a sample, and give a scalar: neither can be fed to the other unseen."""
    losses = torch.rand(4)
    saddle = SaddleWeights(4)(torch.arange(4), losses, losses / 2)
    with pytest.raises(ValueError, match="one loss a sample"):
        Reweighter()(saddle)
    weighed, _ = Reweighter()(losses)
    with pytest.raises(ValueError, match="supervised must hold a loss"):
        SaddleWeights(4)(torch.arange(4), weighed, weighed)


def test_decay_on_the_latent_weight_is_a_barrier_on_the_weight() -> None:
    """½ wd v² = ½ wd b² tan²(w/a): weaker by γ² near zero, infinite at the bound."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    compand(model, WeightCompander(2.0, 2.0))
    (each,) = companders(model).values()
    a, b = each.values
    w = model[0].weight.detach()
    v = model[0].parametrizations.weight.original.detach()  # type: ignore[union-attr]
    assert torch.allclose(v.square(), (b * torch.tan(w / a)).square(), atol=1e-12)
    near = torch.tensor(1e-6, dtype=D)
    assert float((b * torch.tan(near / a)) ** 2 / near**2) == pytest.approx(0.25, rel=1e-6)


def test_averages_over_the_chosen_modules_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    attach(model, LoRA(2))
    x, y = torch.randn(40, 4), torch.randn(40, 2)
    found = DifferentialSearch(20, 5)(
        maps(model),
        [["0", "2", "4"]],
        [p for p in model.parameters() if p.requires_grad],
        lambda rows: (model(x[rows]) - y[rows]).square().mean(),
        lambda step: slice(0, 20),
        lambda step: slice(20, 40),
        share=0.4,
    )
    chosen = found.parameters(model)
    rest = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in chosen}
    assert len(found.names) == 1
    ema = BalancedEMA(chosen, Fixed(0.5))
    optimizer = torch.optim.SGD([*chosen.values(), *rest.values()], lr=0.1)
    before = {n: p.detach().clone() for n, p in chosen.items()}
    (model(x) - y).square().mean().backward()
    optimizer.step()
    ema.update()
    moved = {n: p.detach().clone() for n, p in rest.items()}
    ema.end_task()
    for n, p in chosen.items():
        assert torch.allclose(p, ema.average[n])
        assert not torch.equal(p, before[n])
    assert all(torch.equal(p, moved[n]) for n, p in rest.items())


@pytest.mark.parametrize(
    ("name", "tuned"),
    [
        ("compander", "gamma"),
        ("adawac", "weight_decay"),
        ("reweighted", "temperature"),
        ("learned_weights", "logit"),
        ("lora", "scale"),
    ],
)
def test_other_outer_algorithms_tune_them(name: str, tuned: str) -> None:
    """STN, and descent through the training."""
    kind = registry.get(name)
    smooth = [n for n in kind.space.grad if n != tuned]
    space = kind.space.own(**dict.fromkeys(smooth, "fixed"), **{tuned: "grad"})
    task = TASK if name != "lora" else tasks.get("digits_transfer", hidden=(16,), activation="tanh")
    for algorithm in (SelfTuning(), Descent(Unrolled(steps=3))):
        learner = kind(space)
        assert isinstance(learner, Trainer)
        learner.setup(task, {"burn_in": 0} if name == "reweighted" else {}, seed=0)
        before = learner.hparams[tuned].detach().clone()
        result = tune(learner, algorithm, 20, history=1000)
        assert torch.isfinite(result.hparams[tuned]).all()
        assert not torch.equal(torch.as_tensor(result.schedule[tuned][-1]).to(before), before)
