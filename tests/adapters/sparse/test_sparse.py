"""LIFT, SaRA and S2FT: supports, counts, what never moves, and the penalty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import Trainer, registry, tasks
from adapters.select import low_rank, top_k
from adapters.sparse.lift import LIFT, lift_projector
from adapters.sparse.s2ft import SELECTIONS
from adapters.sparse.sara import sara_projector
from adapters.split import Part
from hypergrad import Unrolled, check_hypergradient

D = torch.float64
SMALLEST = tasks.get("digits_transfer", hidden=(2,), activation="tanh")
TASK = tasks.get("digits_transfer", hidden=(32, 16), activation="tanh")


def learner(name: str, task: Any = TASK, **values: Any) -> Trainer:
    made = registry.get(name)()
    made.setup(task, values, seed=0)
    assert isinstance(made, Trainer)
    return made


def weights(made: Trainer) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in made.params.items() if n.startswith(("layers.0", "layers.1"))}


def test_lift_finds_a_planted_low_rank_part_under_larger_noise() -> None:
    """|W_1| finds an outer product under noise with larger entries; |W| does not."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.zeros(200, 1, dtype=D) for _ in range(2))
    u[:20], v[:20] = 1.0, 1.0
    noise = 0.6 * torch.randn(200, 200, generator=generator, dtype=D)
    w = u @ v.T + noise
    assert float(noise.abs().max()) > 1.5
    planted = (u @ v.T).bool()
    found = top_k(low_rank(w, 1), 400)
    plain = top_k(w.abs(), 400)
    assert float((found & planted).sum()) / 400 > 0.9
    assert float((plain & planted).sum()) / 400 < 0.5


def test_lift_keeps_as_many_entries_as_lora_has() -> None:
    made = learner("lift", budget_rank=2, filter_rank=4)
    before = weights(made)
    for _ in range(5):
        made.step()
    for name, value in weights(made).items():
        moved = int((value != before[name]).sum())
        assert moved == 2 * sum(value.shape)
    full = lift_projector(40, 1000)
    w = torch.randn(6, 5)
    support = full.fit((Part((6, 5)),), w.flatten(), w.flatten(), 0, None)
    assert len(support["index"]) == 30, "a budget above the size is everything"
    plain = lift_projector(5, 1).fit((Part((6, 5)),), w.flatten(), w.flatten(), 0, None)
    assert torch.equal(plain["index"], top_k(w.abs(), 11).flatten().nonzero()[:, 0])


def test_lift_defaults_to_the_largest() -> None:
    """The released configurations select the smallest entries by a slip."""
    assert LIFT.space["direction"].default_value == "largest"
    w = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
    largest = lift_projector(2, 1).count(w)
    assert largest == 4
    one = lift_projector(2, 1, largest=False).fit(
        (Part((2, 2)), Part((1,), False)), torch.zeros(5), torch.zeros(5), 0, None
    )
    assert len(one["index"]) == 5


@pytest.mark.parametrize("mode", ["share", "threshold"])
def test_sara_moves_small_weights_only(mode: str) -> None:
    values = {"mode": mode, mode: 0.1 if mode == "share" else 0.02, "reselect": 4, "min_dim": 8}
    made = learner("sara", **values, lr=0.02)
    before = weights(made)
    first = made.method.memory["index"]
    for step in range(1, 10):
        made.step()
        index = made.method.memory["index"]
        if step <= 4:
            assert torch.equal(index, first)
        if step == 4:
            middle = weights(made)
    second = made.method.memory["index"]
    assert set(second.tolist()) < set(first.tolist())
    for name, value in weights(made).items():
        moved = value != before[name]
        if mode == "threshold":
            assert (before[name][moved].abs() < 0.02).all()
        else:
            assert int(moved.sum()) <= round(0.1 * value.numel())
            limit = before[name].abs().flatten().sort().values[round(0.1 * value.numel())]
            assert (before[name][moved].abs() <= limit).all()
        late = value != middle[name]
        assert (late <= moved).all(), "what leaves keeps its value"


def test_saras_penalty_is_the_nuclear_norm_of_the_entries_and_its_gradient_stays_on_them() -> None:
    made = learner("sara", TASK.to(D), min_dim=8, sampling="all", nuclear=1e-3)
    batch = made.inner_batches(1)[0]
    index = set(made.method.memory["index"].tolist())
    losses = []
    for factor in (1.0, 2.0):
        hparams = {n: factor * v if n == "nuclear" else v for n, v in made.hparams.items()}
        losses.append(float(made.problem.inner_loss(made.params, hparams, batch).detach()))
    start, total = 0, 0.0
    for name in made.params:
        value = made.params[name].detach()
        kept = [i - start for i in range(start, start + value.numel()) if i in index]
        if name in weights(made):
            masked = torch.zeros(value.numel(), dtype=D)
            masked[kept] = value.flatten()[kept]
            total += float(torch.linalg.svdvals(masked.view(value.shape)).sum())
        start += value.numel()
    assert losses[1] - losses[0] == pytest.approx(1e-3 * total, rel=1e-9)


def test_hypergradient_of_saras_penalty_passes_through_the_svd() -> None:
    made = learner("sara", TASK.to(D), min_dim=8, nuclear=5e-3, share=0.3)
    batches = made.inner_batches(5)
    report = check_hypergradient(
        Unrolled(made.optimizer, steps=5),
        made.problem,
        made.params,
        made.hparams,
        batches.__getitem__,
        made.outer_batch(),
        tol=1e-6,
    )
    assert report.passed, str(report)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_s2ft_trains_whole_rows_and_columns_of_as_many_units_as_asked(selection: str) -> None:
    made = learner("s2ft", up=0.125, down=0.25, selection=selection)
    before = weights(made)
    for _ in range(4):
        made.step()
    after = weights(made)
    rows = columns = 0
    for name, value in after.items():
        moved = value != before[name]
        whole = moved.float().mean(dim=1) > 0.9
        rows += int(whole.sum())
        if name.startswith("layers.1"):
            # Columns of the second layer belong to units of the first.
            columns = int((moved[~whole].float().mean(dim=0) > 0.9).sum())
    assert rows == round(0.125 * 48)
    assert columns <= round(0.25 * 48)
    equal = learner("s2ft", up=0.125, down=0.25, selection=selection, allocation="equal")
    masks = equal.method.masks  # type: ignore[attr-defined]
    assert [int(m.all(dim=1).sum()) for m in masks] == [4, 2]


@pytest.mark.slow
def test_what_supports_learn_and_keep_at_five_percent() -> None:
    """Of two hidden layers, nothing else: full > LIFT > units > LIFT's smallest > smallest |W|.

    Whole units keep most of the source, and LIFT more than dense training.  LIFT and the largest
    |W| are equal at this size.
    """
    target, source = {}, {}
    arms: dict[str, tuple[str, dict[str, Any]]] = {
        "full": ("finetune", {}),
        "LIFT": ("lift", {"budget_rank": 5}),
        "units": ("s2ft", {"up": 0.028, "down": 0.028}),
        "smallest of LIFT": ("lift", {"budget_rank": 5, "direction": "smallest"}),
        "smallest": ("sara", {"share": 0.05, "min_dim": 1024, "reselect": 1000}),
    }
    for arm, (name, values) in arms.items():
        sums = [0.0, 0.0]
        for seed in range(3):
            task = tasks.get("digits_rotated", seed=seed)
            frozen = {} if arm == "full" else {"head": False}
            made = registry.get(name)()
            assert isinstance(made, Trainer)
            made.setup(task, {"lr": 5e-3, **values, **frozen}, seed=seed)
            for _ in range(150):
                made.step()
            data = task.split("source_test")
            with torch.no_grad():
                hits = made.module()(data["x"]).argmax(1) == data["y"]
            sums[0] += made.evaluate("test")["accuracy"] / 3
            sums[1] += float(hits.double().mean()) / 3
        target[arm], source[arm] = sums
    assert sorted(arms, key=lambda arm: -target[arm]) == list(arms), target
    assert source["units"] > source["LIFT"] + 0.2 > source["full"] + 0.3, source


@pytest.mark.parametrize("name", ["lift", "sara", "s2ft"])
def test_a_frozen_head_leaves_the_entries_alone_to_move(name: str) -> None:
    """And all start at the pretrained network: published SaRA writes |W| into its first forward."""
    task = tasks.get("digits_rotated", hidden=(32, 16), activation="tanh")
    made = learner(name, task, head=False)
    start = learner("finetune", task)
    assert dict(made.evaluate("val")) == dict(start.evaluate("val"))
    before = {n: p.clone() for n, p in start.module().named_parameters()}
    for _ in range(3):
        made.step()
    moved = {n: (p != before[n]).any() for n, p in made.module().named_parameters()}
    assert {n for n, there in moved.items() if there} == {"layers.0.weight", "layers.1.weight"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sara_projector(), "give threshold or share"),
        (lambda: sara_projector(0.1, 0.1), "give threshold or share"),
        (lambda: sara_projector(0.0), "threshold must be positive"),
        (lambda: sara_projector(share=1.5), "share must lie in"),
        (lambda: lift_projector(0, 1), "ranks must be at least 1"),
        (lambda: lift_projector(1, 0), "ranks must be at least 1"),
        (
            lambda: learner("sara", SMALLEST, mode="threshold", threshold=1e-4, head=False),
            "chooses no entry at all",
        ),
        (lambda: learner("s2ft", up=0.0, down=0.0), "up and down choose no unit"),
        (lambda: learner("sara", mode="share", threshold=0.1), "threshold"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
