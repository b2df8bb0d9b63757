"""DiffoRA as a learner: phases, adapters, sharing, resume, and who tunes it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import Trainer, artifacts, registry, tasks
from adapters.reparam import attach, maps, share
from adapters.tasks.make import halves
from adapters.weights import SORSA, LoRA
from adapters.weights.diffora import DiffoRA
from bilevel import Descent, Float, SelfTuning, Space, tune
from bilevel.balanced_ema import BalancedEMA, Fixed
from bilevel.selection import of_modules
from hypergrad import Unrolled
from tests.adapters import battery

SMALL = {"hidden": (24, 24, 24), "activation": "tanh"}
TASK = tasks.get("digits_transfer", **SMALL)
QUICK = {"search_steps": 12, "warm_up": 0.2}


def learner(task: Any = TASK, seed: int = 0, space: Space | None = None, **hparams: Any) -> Trainer:
    made = registry.get("diffora")(space)
    assert isinstance(made, Trainer)
    made.setup(task, {**QUICK, **hparams}, seed=seed)
    return made


def method_of(made: Trainer) -> DiffoRA:
    assert isinstance(made.method, DiffoRA)
    return made.method


def adapting(**hparams: Any) -> Trainer:
    made = learner(**hparams)
    while made.phase == "search":
        made.step()
    return made


def names_in(made: Trainer) -> set[str]:
    return {n.split(".parametrizations.")[0] for n in made.params if ".parametrizations." in n}


@pytest.mark.parametrize("adapter", list(DiffoRA.adapters))
@pytest.mark.parametrize("hypergradient", ["first_order", "finite_difference", "score"])
def test_over_every_adapter(adapter: str, hypergradient: str) -> None:
    made = learner(adapter=adapter, hypergradient=hypergradient, rank=2, share=0.4)
    assert names_in(made) == {"layers.0", "layers.1", "layers.2"}
    with pytest.raises(RuntimeError, match="the search is not over"):
        _ = method_of(made).selection
    before = made.evaluate("train")["loss"]
    while made.phase == "search":
        made.step()
    found = method_of(made).selection
    assert len(found.names) == 1
    assert names_in(made) == set(found.names)
    assert found.history.shape == (10, 1, 3)
    assert found.history.unique(dim=0).shape[0] == 10, "α moves at every step"
    for _ in range(40):
        made.step()
    assert made.evaluate("train")["loss"] < before
    plain = made.module()
    assert not maps(plain)
    x, y = (TASK.split("test")[k] for k in "xy")
    loss = nn.functional.cross_entropy(plain(x), y)
    assert float(loss.detach()) == pytest.approx(made.evaluate("test")["loss"], rel=1e-5)


def test_the_modules_start_again_from_the_pretrained_network() -> None:
    """Nothing of the search is left but the selection."""
    made = adapting(share=0.4)
    x = TASK.split("test")["x"]
    with torch.no_grad():
        assert torch.allclose(made.module()(x), pretrained()(x), atol=1e-6)


def pretrained() -> nn.Module:
    net = artifacts.resolve(["target_net"], TASK, 0)["target_net"]
    assert isinstance(net, nn.Module)
    return net


def test_the_search_is_evaluated_at_its_gates() -> None:
    made = learner()
    for _ in range(8):
        made.step()
    logits = made.method.memory["search"]["logits"]
    gates = logits.softmax(1).flatten()
    assert logits.any()
    model = made.module()
    x = TASK.split("test")["x"]
    net, params = pretrained(), made.params
    attach(net, dict.fromkeys(["layers.0", "layers.1", "layers.2"], LoRA(4)), train="layers.3.*")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name in params:
                parameter.copy_(params[name])
        for each, gate in zip(maps(net).values(), gates, strict=True):
            each.gate = gate
        assert torch.allclose(model(x), net(x), atol=1e-6)


def test_halves_are_disjoint_and_stratified_and_hold_training_samples_only() -> None:
    split = {**TASK.split("train"), "number": torch.arange(100)}
    one, two = halves(split, seed=3)
    assert sorted([*one["number"].tolist(), *two["number"].tolist()]) == list(range(100))
    counts = [half["y"].bincount(minlength=5) for half in (one, two)]
    assert (counts[0] - counts[1]).abs().max() <= 1
    made = learner()
    assert len(made.method.pool("search")["y"]) == 50
    assert len(made.method.pool("adapt")["y"]) == 100


def test_sharing_trains_one_small_map_in_all_that_is_not_selected() -> None:
    """Parameters: Σ selected r (i + o) + Σ groups of equal shape r_s (i + o), and the head."""
    made = adapting(share=0.3, rank=4, sharing="shared", shared_rank=2)
    (chosen,) = method_of(made).selection.names
    shapes = {"layers.0": (24, 64), "layers.1": (24, 24), "layers.2": (24, 24)}
    groups = {shapes[n] for n in shapes if n != chosen}
    head = 24 * 5 + 5
    expected = 4 * sum(shapes[chosen]) + sum(2 * sum(shape) for shape in groups) + head
    assert sum(p.numel() for p in made.params.values()) == expected
    for _ in range(3):
        made.step()
    model = made._assembly.model
    rest = [maps(model)[n] for n in shapes if n != chosen and shapes[n] == (24, 24)]
    if len(rest) == 2:
        assert rest[0].parts["A"] is rest[1].parts["A"]
    assert not maps(made.module())


def test_keeping_freezes_what_the_search_found_at_its_gates() -> None:
    made = learner(share=0.3, sharing="keep")
    for _ in range(11):
        made.step()
    searched = {}
    while made.phase == "search":
        searched = made.params
        made.step()
    (chosen,) = method_of(made).selection.names
    model = made._assembly.model
    gates = method_of(made).selection.logits.softmax(1).flatten()
    for i, (name, each) in enumerate(maps(model).items()):
        if name != chosen:
            assert each.gate == pytest.approx(float(gates[i]))
            assert each.parts["B"].any()
            assert f"{name}.parametrizations.weight.0.B" in searched
    assert names_in(made) == {chosen}


@pytest.mark.parametrize("sharing", ["none", "shared", "keep"])
@pytest.mark.parametrize("steps", [7, 12, 15])
def test_resume_in_the_middle_of_the_search_and_after_it(sharing: str, steps: int) -> None:
    hparams = {"sharing": sharing, "hypergradient": "finite_difference", "share": 0.4}
    made = learner(seed=3, **hparams)
    for _ in range(steps):
        made.step()
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    buffer.seek(0)
    expected = battery.numbers(made, 10)
    again = learner(seed=3, **hparams)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert battery.numbers(again, 10) == expected
    one, two = method_of(made).selection, method_of(again).selection
    assert torch.equal(one.history, two.history)
    assert one.names == two.names


def test_other_shares_go_on_from_one_search() -> None:
    cache: dict[str, dict[str, Any]] = {}
    kind = registry.get("diffora")
    found = []
    for value in (0.4, 0.7):
        made = kind(phase_cache=cache)
        assert isinstance(made, Trainer)
        made.setup(TASK, {**QUICK, "share": value}, seed=0)
        while made.phase == "search":
            made.step()
        found.append(set(method_of(made).selection.names))
    assert len(cache) == 1
    assert found[0] < found[1]


def test_smooth_hyperparameters_of_the_search_match_differences() -> None:
    """The battery compares those of the second phase."""
    subject = battery.Subject(registry.get("diffora"), "digits_transfer", SMALL, {"warm_up": 0.0})
    battery.compare_with_differences(subject, {"lr", "weight_decay", "scale"}, last=False)


def test_a_window_of_training_moves_the_gates_as_often_as_its_steps() -> None:
    made = learner(search_steps=40)
    tune(made, Descent(Unrolled(steps=5)), 20)
    state = made.method.memory["search"]
    assert state["step"] == 20
    assert len(state["history"]) == 12  # warm-up: 8 of 40


@pytest.mark.parametrize(
    "algorithm", [SelfTuning(), Descent(Unrolled(steps=3))], ids=lambda a: type(a).__name__
)
def test_outer_algorithms_tune_the_adaptation(algorithm: Any) -> None:
    kind = registry.get("diffora")
    space = kind.space.own(lr="sampler", scale="fixed")
    made = adapting(space=space, weight_decay=1e-3)
    before = made.hparams["weight_decay"].clone()
    result = tune(made, algorithm, 20)
    assert torch.isfinite(result.hparams["weight_decay"]).all()
    values = torch.as_tensor(result.schedule["weight_decay"])
    assert not torch.equal(values[-1].to(before), before)


def test_an_average_over_the_chosen_modules_of_a_learner() -> None:
    made = adapting(share=0.4)
    chosen = of_modules(made.params, method_of(made).selection.names)
    assert {n.rpartition(".")[2] for n in chosen} == {"A", "B"}
    values = {n: nn.Parameter(p.detach().clone()) for n, p in chosen.items()}
    ema = BalancedEMA(values, Fixed(0.5))
    for _ in range(2):
        params, (batch,) = made.params, made.inner_batches(1)
        loss = made.problem.inner_loss(params, made.hparams, batch)
        grads = torch.autograd.grad(loss, [params[n] for n in values])
        made.step()
        for (n, value), grad in zip(values.items(), grads, strict=True):
            value.data.copy_(made.params[n])
            value.grad = grad
        ema.update()
    ema.end_task()
    made.adopt({**made.params, **values}, made.optimizer_state, steps=0)
    assert all(torch.equal(made.params[n], ema.average[n]) for n in values)


# Bad input.


def test_a_network_without_candidates() -> None:
    with pytest.raises(ValueError, match="there are no candidate modules: MLP has no layer"):
        learner(tasks.get("digits_transfer", hidden=()))


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5])
def test_a_share_outside_its_range(value: float) -> None:
    with pytest.raises(ValueError, match="share"):
        learner(share=value)
    free = Space({**registry.get("diffora").space, "share": Float(-2.0, 2.0)})
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
        learner(space=free, share=value)


def test_a_rank_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"layers.0: rank must lie in 1 ... 24"):
        learner(rank=32)


def test_a_single_training_sample() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, but got 1"):
        halves({"x": torch.zeros(1, 2), "y": torch.zeros(1, dtype=torch.int64)}, 0)


def test_nan_on_the_half_of_the_gates_is_named_and_nothing_is_lost() -> None:
    made = learner()
    for _ in range(6):
        made.step()
    state = made.state_dict()
    good = made.method._sides  # type: ignore[attr-defined]
    bad = {**good[1], "x": torch.full_like(good[1]["x"], torch.nan)}
    made.method._sides = (good[0], bad)  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match="validation loss of the search is nan at step 6"):
        made.step()
    assert torch.equal(made.method.memory["search"]["logits"], state["memory"]["search"]["logits"])
    assert all(p.isfinite().all() for p in made.params.values())
    made.method._sides = good  # type: ignore[attr-defined]
    made.load_state_dict(state)
    other = learner()
    other.load_state_dict(state)
    assert battery.numbers(made, 4) == battery.numbers(other, 4)


def test_maps_that_start_from_their_own_weight_share_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2))
    found = attach(model, SORSA(2), ["0", "2"])
    modules = {n: model.get_submodule(n) for n in found}
    before: Tensor = model[2].weight.detach().clone()
    with pytest.raises(ValueError, match="2 cannot share the tensors of 0"):
        share(modules, found)
    assert torch.equal(model[2].weight, before)
    plain = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2))
    found = attach(plain, LoRA(2))
    assert share({n: plain.get_submodule(n) for n in found}, found) == 2
    assert sum(p.numel() for p in plain.parameters() if p.requires_grad) == 2 * 12 + 2 * 8
