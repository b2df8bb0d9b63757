"""The split optimizer: what it equals, what never moves, and what telescopes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.fft import dct
from torch import Tensor, nn

from adapters.split import (
    Basis,
    Blocks,
    Coordinates,
    Fixed,
    Part,
    Projector,
    Slices,
    Split,
    SplitOptimizer,
    dct_matrix,
)
from hypergrad import Hyper, Problem, Unrolled, check_hypergradient
from hypergrad.optimizers import SGD, Adam

D = torch.float64
PARTS = (Part((6, 4)), Part((5,), split=False), Part((3, 7)))
SIZE = 24 + 5 + 21


def random_entries(share: float = 0.3, **options: bool) -> Coordinates:
    return Coordinates(None, lambda w: max(1, int(share * w.numel())), **options)


PROJECTORS: dict[str, Projector] = {
    "entries": random_entries(),
    "largest": Coordinates(torch.abs, lambda w: 5),
    "rows": Slices(0.4, "rows"),
    "columns": Slices(0.5, "columns"),
    "blocks": Blocks(0.5),
    "svd": Basis(2),
    "dct": Basis(2, "dct"),
    "random": Basis(0.5, "random"),
    "larger side": Basis(2, side="larger"),
    "left DCT": Basis(2, "dct", side="left"),
}


def vector(seed: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=D)


def run(split: Split, steps: int, w: Tensor | None = None) -> list[Tensor]:
    """Weights along steps with gradients that depend on the weights."""
    w = vector(0) if w is None else w
    values = {k: float(v) for k, v in split.hyperparameters.items()}
    state, path = split.init(w), [w]
    for t in range(steps):
        grad = 0.3 * path[-1] + vector(100 + t)
        after, state = split.update(path[-1], grad, state, dict(values))
        path.append(after)
    return path


@pytest.mark.parametrize("name", PROJECTORS)
def test_a_subspace_and_its_rest_make_the_gradient(name: str) -> None:
    project, g = PROJECTORS[name], vector(1)
    support = project.fit(PARTS, g, vector(0), 0, None)
    a = project.down(PARTS, support, g)
    inside = project.up(PARTS, support, a)
    rest = g - inside
    assert torch.allclose(inside + rest, g, atol=1e-15)
    assert abs(float(inside @ rest)) < 1e-12, "orthogonal"
    assert torch.allclose(project.down(PARTS, support, rest), torch.zeros_like(a), atol=1e-12)
    assert torch.equal(inside[24:29], g[24:29]), "a part that is not split is whole"
    moved = project.move(PARTS, support, support, a.square(), square=True)
    assert torch.allclose(moved, a.square(), atol=1e-12)


@pytest.mark.parametrize("transport", ["reset", "keep", "move"])
def test_all_coordinates_are_adamw(transport: str) -> None:
    """Without a refresh; with a refresh that moves, too."""
    whole = Coordinates(None, lambda w: w.numel())
    refresh = 3 if transport == "move" else 0
    split = Split(
        Adam(0.01),
        whole,
        PARTS,
        refresh=refresh,
        transport=transport,
        weight_decay=0.1,  # type: ignore[arg-type]
    )
    w = vector(0).clone().requires_grad_()
    optimizer = torch.optim.AdamW([w], lr=0.01, weight_decay=0.1)
    for t, expected in enumerate(run(split, 20)):
        assert torch.allclose(w.detach(), expected, rtol=0, atol=2e-15)
        w.grad = 0.3 * w.detach() + vector(100 + t)
        optimizer.step()


def test_a_full_basis_is_the_identity_but_not_adam() -> None:
    g = vector(1)
    for kind in ("svd", "dct", "random"):
        full = Basis(1.0, kind)  # type: ignore[arg-type]
        support = full.fit(PARTS, g, vector(0), 0, None)
        inside = full.up(PARTS, support, full.down(PARTS, support, g))
        assert torch.allclose(inside, g, atol=1e-12)
    adam = run(Split(Adam(0.1), random_entries(1.0), PARTS), 10)[-1]
    turned = run(Split(Adam(0.1), Basis(1.0), PARTS, transport="keep"), 10)[-1]
    assert float((adam - turned).abs().max()) > 0.01


def test_no_coordinates_are_sign_descent() -> None:
    """On the split tensors; the others get Adam."""
    split = Split(Adam(0.01), Slices(0.0), PARTS, "sign")
    adam = run(Split(Adam(0.01), random_entries(1.0), PARTS), 8)
    w = vector(0)
    for t, found in enumerate(run(split, 8)[1:]):
        w = w - 0.01 * (0.3 * w + vector(100 + t)).sign()
        expected = torch.cat([w[:24], adam[t + 1][24:29], w[29:]])
        assert torch.allclose(found, expected, atol=1e-14)


@pytest.mark.parametrize("name", ["entries", "largest", "rows", "columns", "blocks"])
def test_off_the_support_nothing_moves(name: str) -> None:
    """Bit for bit, with weight decay on the support, momentum, and no refresh."""
    split = Split(Adam(0.01), PROJECTORS[name], PARTS, decay_support=True, weight_decay=0.5)
    path = run(split, 12)
    support = PROJECTORS[name].fit(PARTS, vector(100), path[0], 0, None)["index"]
    off = torch.ones(SIZE, dtype=torch.bool)
    off[support] = False
    assert torch.equal(path[-1][off], path[0][off])
    assert (path[-1][~off] != path[0][~off]).all()


def test_what_leaves_the_support_stays_where_it_is() -> None:
    split = Split(Adam(0.05), random_entries(), PARTS, refresh=4, transport="move")
    path = run(split, 12)
    for block in range(3):
        index = random_entries().fit(PARTS, vector(0), path[4 * block], block, None)["index"]
        off = torch.ones(SIZE, dtype=torch.bool)
        off[index] = False
        for t in range(4 * block, 4 * block + 4):
            assert torch.equal(path[t + 1][off], path[t][off])


def test_moved_moments_are_the_old_ones_on_the_intersection_and_zero_on_new_entries() -> None:
    split = Split(Adam(0.05), random_entries(), PARTS, refresh=5, transport="move")
    values = {k: float(v) for k, v in split.hyperparameters.items()}
    w, state = vector(0), split.init(vector(0))
    for t in range(5):
        w, state = split.update(w, vector(100 + t), state, dict(values))
    before, old = state["support/index"], state["base/exp_avg"]
    g = vector(200)
    w, state = split.update(w, g, state, dict(values))
    dense = torch.zeros(SIZE, dtype=D)
    dense[before] = old
    index = state["support/index"]
    assert torch.allclose(state["base/exp_avg"], 0.9 * dense[index] + 0.1 * g[index], atol=1e-15)
    fresh = ~torch.isin(index, before)
    assert fresh.any()
    assert set(state["base/step"][fresh].tolist()) == {1.0}
    assert set(state["base/step"][~fresh].tolist()) == {6.0}


def test_a_new_entry_starts_with_a_first_step() -> None:
    """|first step| = η: with the old count it would be up to 3.2 η for β₂ = .999."""
    split = Split(Adam(0.05, eps=0.0), random_entries(), PARTS, refresh=5, transport="move")
    path = run(split, 6)
    first = random_entries().fit(PARTS, vector(0), path[0], 0, None)["index"]
    second = random_entries().fit(PARTS, vector(0), path[5], 1, None)["index"]
    new = second[~torch.isin(second, first)]
    step = (path[6] - path[5])[new].abs()
    assert torch.allclose(step, torch.full_like(step, 0.05), rtol=1e-9)


@pytest.mark.parametrize("kind", ["svd", "dct", "random"])
@pytest.mark.parametrize("refresh", [1, 3])
def test_error_feedback_telescopes(kind: str, refresh: int) -> None:
    """Σ projected + E_T = Σ gradients, so that nothing of the gradient is lost."""
    basis = Basis(2, kind)  # type: ignore[arg-type]
    split = Split(SGD(1.0), basis, PARTS, refresh=refresh, transport="keep", error_feedback=True)
    values = {k: float(v) for k, v in split.hyperparameters.items()}
    w, state = torch.zeros(SIZE, dtype=D), split.init(torch.zeros(SIZE, dtype=D))
    for t in range(10):
        w, state = split.update(w, vector(t), state, dict(values))
    total = sum(vector(t) for t in range(10))
    assert torch.allclose(-w + state["error"], total, atol=1e-12)


def test_galore_without_norms_against_a_reference() -> None:
    """A dense loop: SVD every three steps, Adam in its coordinates, moments kept."""
    parts, scale = (Part((6, 4)),), 0.25
    split = Split(Adam(0.1), Basis(2), parts, refresh=3, transport="keep", projected_scale=scale)
    values = {k: float(v) for k, v in split.hyperparameters.items()}
    w, state = vector(0)[:24], split.init(vector(0)[:24])
    reference, m, v = w.clone().view(6, 4), torch.zeros(6, 2, dtype=D), torch.zeros(6, 2, dtype=D)
    q = torch.zeros(4, 2, dtype=D)
    for t in range(8):
        g = vector(50 + t)[:24]
        w, state = split.update(w, g, state, dict(values))
        if t % 3 == 0:
            q = torch.linalg.svd(g.view(6, 4), full_matrices=False)[2][:2].T
        a = g.view(6, 4) @ q
        m, v = 0.9 * m + 0.1 * a, 0.999 * v + 0.001 * a**2
        step = (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        reference = reference - 0.1 * scale * step @ q.T
        assert torch.allclose(w.view(6, 4), reference, atol=1e-12)


def test_dct_is_scipys_and_the_best_columns_with_the_2_norm() -> None:
    g = vector(3)[:24].view(6, 4)
    assert torch.allclose(g @ dct_matrix(4), torch.from_numpy(dct(g.numpy(), norm="ortho")))
    wide = torch.randn(10, 8, generator=torch.Generator().manual_seed(1), dtype=D)
    parts = (Part((10, 8)),)
    basis = Basis(3, "dct", norm=2)
    support = basis.fit(parts, wide.flatten(), wide.flatten(), 0, None)
    inside = basis.up(parts, support, basis.down(parts, support, wide.flatten()))
    error = float((wide.flatten() - inside).square().sum())
    q = dct_matrix(8)
    errors = []
    for subset in itertools.combinations(range(8), 3):
        kept = q[:, list(subset)]
        errors.append(float((wide - wide @ kept @ kept.T).square().sum()))
    assert error == pytest.approx(min(errors), rel=1e-12)
    assert error <= (1 - 3 / 8) * float(wide.square().sum())


def test_moments_of_dct_columns_follow_their_column() -> None:
    parts, basis = (Part((5, 4)),), Basis(2, "dct")
    before, after = {"0": torch.tensor([0, 2])}, {"0": torch.tensor([2, 3])}
    a = torch.arange(10.0, dtype=D)
    moved = basis.move(parts, before, after, a, square=True).view(5, 2)
    assert torch.equal(moved[:, 0], a.view(5, 2)[:, 1])
    assert not moved[:, 1].any()


def test_a_rotation_within_a_subspace_keeps_counts_of_steps() -> None:
    """|t R| would make counts of 7 steps 9.9 and 0 here, and a late entry's step a first one."""
    parts, basis = (Part((5, 4)),), Basis(2)
    q = torch.linalg.qr(vector(7)[:16].view(4, 4)).Q
    turn = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=D) / 2**0.5
    before, after = {"0": q[:, :2]}, {"0": q[:, :2] @ turn}
    counts = torch.full((10,), 7.0, dtype=D)
    assert torch.allclose(basis.move(parts, before, after, counts, square=True), counts)
    moments = vector(8)[:10]
    there = basis.move(parts, before, after, moments, square=False)
    assert torch.allclose(basis.up(parts, after, there), basis.up(parts, before, moments))
    outside = {"0": torch.stack([q[:, 0], q[:, 3]], 1)}
    entering = basis.move(parts, before, outside, counts, square=True).view(5, 2)
    assert torch.allclose(entering, torch.tensor([7.0, 0.0], dtype=D).expand(5, 2), atol=1e-12)


def test_the_side_decides_what_is_projected() -> None:
    tall = (Part((6, 4)),)
    g = vector(1)[:24]
    u, _, vt = torch.linalg.svd(g.view(6, 4), full_matrices=False)
    for side, expected, size in (
        ("smaller", g.view(6, 4) @ vt[:2].T @ vt[:2], 12),
        ("right", g.view(6, 4) @ vt[:2].T @ vt[:2], 12),
        ("larger", u[:, :2] @ u[:, :2].T @ g.view(6, 4), 8),
        ("left", u[:, :2] @ u[:, :2].T @ g.view(6, 4), 8),
    ):
        basis = Basis(2, side=side)  # type: ignore[arg-type]
        a = basis.down(tall, basis.fit(tall, g, g, 0, None), g)
        assert len(a) == size
        support = basis.fit(tall, g, g, 0, None)
        assert torch.allclose(basis.up(tall, support, a), expected.reshape(-1), atol=1e-12)


def test_a_shrinking_support_is_a_subset() -> None:
    project = Coordinates(torch.abs, lambda w: int((w.abs() < 0.5).sum()), False, shrink=True)
    split = Split(Adam(0.3), project, PARTS, refresh=3, refreshes=1, transport="reset")
    values = {k: float(v) for k, v in split.hyperparameters.items()}
    w, state, seen = vector(0), split.init(vector(0)), []
    for t in range(9):
        before = w
        w, state = split.update(w, vector(100 + t), state, dict(values))
        seen.append((set(state["support/index"].tolist()), before))
    assert seen[2][0] > seen[3][0] == seen[8][0]
    for i in (seen[2][0] - seen[3][0]) - set(range(24, 29)):
        assert abs(float(seen[3][1][i])) >= 0.5


def test_blocks_take_turns() -> None:
    parts = tuple(Part((2, 2)) for _ in range(4))
    project, w = Blocks(0.5, "ascending"), torch.zeros(16)
    chosen = [project.fit(parts, w, w, c, None)["index"].tolist() for c in range(3)]
    assert chosen == [list(range(8)), list(range(8, 16)), list(range(8))]
    back = Blocks(0.5, "descending").fit(parts, w, w, 0, None)["index"].tolist()
    assert back == list(range(8, 16))
    few = Blocks(0.1, "ascending").fit(parts, w, w, 2, None)["index"].tolist()
    assert few == list(range(8, 12)), "round(0.4) = 0 would leave no tensor with a state"


@pytest.mark.parametrize("name", PROJECTORS)
def test_as_a_torch_optimizer(name: str) -> None:
    """The same numbers as the pure rule, and an exact resume."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double() for _ in range(3)]
    for other in models[1:]:
        other.load_state_dict(models[0].state_dict())
    x, y = torch.randn(12, 6, dtype=D), torch.randint(5, (12,))
    made = [
        SplitOptimizer(m.parameters(), PROJECTORS[name], 0.02, refresh=2, weight_decay=0.1)
        for m in models
    ]

    def step(i: int) -> None:
        made[i].zero_grad()
        nn.functional.cross_entropy(models[i](x), y).backward()
        made[i].step()

    for _ in range(5):
        step(0), step(1)
    made[2].load_state_dict(made[0].state_dict())
    models[2].load_state_dict(models[0].state_dict())
    for _ in range(3):
        step(1), step(2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(models[1].parameters(), models[2].parameters(), strict=True)
    )
    scheduler = torch.optim.lr_scheduler.StepLR(made[0], 1, gamma=0.0)
    step(0)
    scheduler.step()
    before = [p.clone() for p in models[0].parameters()]
    step(0)
    assert all(torch.equal(a, b) for a, b in zip(before, models[0].parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("entries", {"transport": "move", "remainder": "sgd"}),
        ("largest", {"transport": "move", "decay_support": True}),
        ("blocks", {"transport": "reset", "remainder": "sign"}),
        ("dct", {"transport": "move", "error_feedback": True}),
        ("dct", {"transport": "move", "remainder": "sign"}),
        ("svd", {"transport": "keep", "error_feedback": True}),
        ("svd", {"transport": "move", "remainder": "sgd"}),
        ("larger side", {"transport": "move"}),
        ("random", {"transport": "move", "remainder": "sgd"}),
    ],
)
def test_hypergradients_pass_through_refreshes(name: str, options: dict[str, Any]) -> None:
    """Against central differences over three subspaces; a detached SVD would be percents off."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(40, SIZE, generator=generator, dtype=D) / SIZE**0.5
    goal = torch.randn(40, generator=generator, dtype=D)
    a, b, c = vector(0).split_with_sizes([24, 5, 21])
    params = {"a": a.view(6, 4), "b": b, "c": c.view(3, 7)}
    params = {k: v.requires_grad_() for k, v in params.items()}

    def loss(w: Any, h: Any, batch: Any) -> Tensor:
        flat = torch.cat([w[k].reshape(-1) for k in "abc"])
        return ((mix @ flat).sin() - batch).square().mean()

    values = {"lr": 0.03, "beta2": 0.9, "decay": 0.1, "projected": 0.7, "free": 0.3}
    hparams = {k: torch.tensor(v, dtype=D, requires_grad=True) for k, v in values.items()}
    if options.get("remainder", "none") == "none":
        hparams.pop("free")
    split = Split(
        Adam(Hyper("lr"), (0.9, Hyper("beta2")), eps=1e-6),
        PROJECTORS[name],
        PARTS,
        refresh=2,
        weight_decay=Hyper("decay"),
        free_scale=Hyper("free") if "free" in hparams else 1.0,
        projected_scale=Hyper("projected"),
        **options,
    )
    report = check_hypergradient(
        Unrolled(split, steps=6), Problem(loss, loss), params, hparams, goal, goal.roll(1), tol=1e-6
    )
    assert {row.name for row in report.rows} >= {f"hparams[{key!r}]" for key in hparams}
    assert report.passed, str(report)


def test_memory_of_the_state() -> None:
    """Adam in r columns: 2 r max(m, n) moments and r min(m, n) numbers of the basis."""
    model = nn.Linear(32, 64, bias=False)
    optimizer = SplitOptimizer(model.parameters(), Basis(4), 0.01)
    model.weight.grad = torch.randn(64, 32)
    optimizer.step()
    assert optimizer.state_bytes == 4 * (2 * 4 * 64 + 4 * 32)
    entries = SplitOptimizer(model.parameters(), Coordinates(torch.abs, lambda w: 100), 0.01)
    entries.step()
    assert entries.state_bytes == 100 * (2 * 4 + 8)


def model() -> nn.Module:
    return nn.Linear(4, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Split(Adam(0.1), Basis(2), PARTS, "signs"), "remainder must be one of"),  # type: ignore[arg-type]
        (lambda: Split(Adam(0.1), Basis(2), PARTS, refresh=-1), "refresh must not be negative"),
        (lambda: Split(Adam(0.1, weight_decay=0.1), Basis(2), PARTS), "weight_decay=0"),
        (lambda: Split(Adam(0.1), Basis(2), (Part((4,), False),)), "no trained tensor is split"),
        (
            lambda: Split(Adam(0.1), Basis(2), PARTS, "sign", error_feedback=True),
            "remainder must be 'none'",
        ),
        (lambda: Basis(0), "rank must be at least 1, but got 0"),
        (lambda: Basis(1.5), r"rank as a share must lie in \(0, 1\], but got 1.5"),
        (lambda: Basis(2, "fft"), "kind must be"),  # type: ignore[arg-type]
        (lambda: Basis(2, norm=3), "norm must be 1 or 2, but got 3"),
        (lambda: Split(Adam(0.1), Basis(5), PARTS), "rank must be at most 4"),
        (lambda: Basis(2, side="top"), "side must be 'smaller'"),  # type: ignore[arg-type]
        (
            lambda: Split(Adam(0.1), Fixed([torch.ones(6, 4, dtype=torch.bool)]), PARTS),
            r"masks must have as many entries as the split tensors, \[24, 21\], but got \[24\]",
        ),
        (lambda: Slices(1.5), r"density must lie in \[0, 1\], but got 1.5"),
        (lambda: Blocks(0.5, "mirror"), "order must be"),  # type: ignore[arg-type]
        (
            lambda: Slices(0.0).fit((Part((2, 2)),), torch.zeros(4), torch.zeros(4), 0, None),
            "chooses no entry at all",
        ),
        (
            lambda: Fixed([torch.zeros(2, 2, dtype=torch.bool)]).fit(
                (Part((2, 2)),), torch.zeros(4), torch.zeros(4), 0, None
            ),
            "chooses no entry at all",
        ),
        (lambda: SplitOptimizer([{"params": []}], Basis(1)), "groups are not supported"),  # type: ignore[list-item]
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_gradient_and_a_foreign_state_are_named() -> None:
    one = model()
    optimizer = SplitOptimizer(one.parameters(), Basis(1), 0.1)
    with pytest.raises(RuntimeError, match=r"parameters \[0, 1\] have no gradient"):
        optimizer.step()
    with pytest.raises(ValueError, match="which are not Split's"):
        optimizer.load_state_dict({"lr": 0.1, "split": {"momentum": 1}})
    bad = SplitOptimizer(one.parameters(), Basis(1), -0.1)
    for p in one.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="lr must be in"):
        bad.step()
    for p in one.parameters():
        p.grad = torch.full_like(p, torch.nan)
    with pytest.raises(FloatingPointError, match="no SVD"):
        optimizer.step()
