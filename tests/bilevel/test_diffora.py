"""DiffoRA: gates, exact selections, hypergradients, and planted modules that are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adapters.reparam import attach, maps
from adapters.weights import HUT, LoRA
from bilevel.diffora import DifferentialSearch, gates
from bilevel.selection import discretize, stability

D = torch.float64
ROWS = [["0", "2"]]


def test_relaxations() -> None:
    logits = torch.randn(3, 4, dtype=D, requires_grad=True)
    rows = gates(logits)
    assert torch.allclose(rows.sum(1), torch.ones(3, dtype=D))
    (grad,) = torch.autograd.grad((rows * torch.randn(3, 4, dtype=D)).sum(), logits)
    assert torch.allclose(grad.sum(1), torch.zeros(3, dtype=D), atol=1e-15)
    assert torch.equal(gates(logits, "sigmoid"), logits.sigmoid())


@given(st.integers(1, 4), st.integers(1, 6), st.floats(0.01, 1.0), st.integers(0, 99))
def test_selections_are_exact_and_grow(layers: int, modules: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(3, (layers, modules), generator=generator).double()  # with ties
    mask = discretize(scores, share)
    count = max(1, int(share * modules + 1e-9))
    assert mask.sum(1).tolist() == [count] * layers
    for row, kept in zip(scores, mask, strict=True):
        assert float(row[kept].sum()) == float(row.sort(descending=True).values[:count].sum())
    assert (mask <= discretize(scores, 1.0)).all()
    assert discretize(scores, 1.0).all()
    wider = discretize(scores, min(1.0, share + 0.2))
    assert (mask <= wider).all()
    everywhere = discretize(scores, share, "global")
    assert int(everywhere.sum()) == max(1, int(share * layers * modules + 1e-9))


def test_ties_and_stability() -> None:
    assert discretize(torch.zeros(2, 4), 0.5).tolist() == [[True, True, False, False]] * 2
    a, b = discretize(torch.zeros(1, 4), 0.5), torch.tensor([[False, True, True, False]])
    assert stability([a, a]) == 1.0
    assert stability([a, b]) == pytest.approx(1 / 3)


class Planted(nn.Module):
    """y = Σ_j G_j x_j (A_j B_j) on groups of features; the target uses some groups only."""

    def __init__(self, groups: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.parts = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(groups))
        for part in self.parts:
            nn.init.zeros_(part.weight)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        pieces = zip(self.parts, x.split(4, dim=1), strict=True)
        return torch.stack([part(piece) for part, piece in pieces]).sum(0)


def planted(seed: int, adapter: object, **options: object) -> tuple[set[str], set[str]]:
    """Return the modules that matter, and those that were found."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(6, generator=generator)[:2].tolist()
    model = Planted(6, seed)
    if isinstance(adapter, HUT):
        for part in model.parts:
            nn.init.normal_(part.weight, std=0.3)
    base = Planted(6, seed)
    base.load_state_dict(model.state_dict())
    attach(model, adapter)  # type: ignore[arg-type]
    x = torch.randn(300, 24, generator=generator, dtype=D)
    with torch.no_grad():
        y = base(x)
        for j in chosen:
            scale = base.parts[j].weight if isinstance(adapter, HUT) else torch.ones(3, 4, dtype=D)
            change = scale * torch.randn(3, 4, generator=generator, dtype=D)
            y = y + x[:, 4 * j : 4 * j + 4] @ change.T
        y = y + 0.3 * torch.randn(y.shape, generator=generator, dtype=D)

    def batch(first: int, step: int) -> tuple[Tensor, Tensor]:
        rows = first + torch.randint(150, (50,), generator=torch.Generator().manual_seed(step))
        return x[rows], y[rows]

    search = DifferentialSearch(
        **{"steps": 120, "warm_up": 10, "lr": 2e-2, "gate_lr": 5e-2, **options}
    )  # type: ignore[arg-type]
    names = [f"parts.{j}" for j in range(6)]
    found = search(
        maps(model),
        [names],
        [p for p in model.parameters() if p.requires_grad],
        lambda given: (model(given[0]) - given[1]).square().mean(),
        lambda step: batch(0, step),
        lambda step: batch(150, step + 10_000),
        share=1 / 3,
    )
    assert all(each.gate == 1.0 for each in maps(model).values())
    return {f"parts.{j}" for j in chosen}, set(found.names)


@pytest.mark.parametrize("hypergradient", ["first_order", "finite_difference", "score"])
def test_planted_modules_are_found_and_the_others_switched_off(hypergradient: str) -> None:
    for seed in range(2):
        wanted, found = planted(seed, LoRA(2), hypergradient=hypergradient)
        assert found == wanted


def test_over_another_adapter() -> None:
    wanted, found = planted(3, HUT(2, std=0.5))
    assert found == wanted


def test_the_finite_difference_is_the_derivative_of_one_unrolled_step() -> None:
    theta = nn.Parameter(torch.tensor([0.5, -0.3], dtype=D))

    class Module:
        gate: float | Tensor = 1.0

    modules = {"a": Module(), "b": Module()}

    def loss(target: Tensor) -> Tensor:
        out = torch.stack([torch.as_tensor(m.gate) for m in modules.values()]) * theta
        return (out.sin() - target).square().sum()

    train, val = torch.tensor([0.7, 0.1], dtype=D), torch.tensor([0.2, 0.4], dtype=D)
    logits = torch.tensor([[0.2, -0.1]], dtype=D, requires_grad=True)

    def hypergradient(search: DifferentialSearch) -> Tensor:
        return search._hypergradient(
            logits, list(modules.values()), [theta], loss, lambda s: train, lambda s: val, 0
        )

    def unrolled(alpha: Tensor) -> Tensor:
        g = gates(alpha)[0]
        w = theta.detach().clone().requires_grad_()
        inner = ((g * w).sin() - train).square().sum()
        (grad,) = torch.autograd.grad(inner, w, create_graph=True)
        return ((g * (w - 0.1 * grad)).sin() - val).square().sum()

    alpha = logits.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(unrolled(alpha), alpha)
    found = hypergradient(DifferentialSearch(2, 0, lr=0.1, hypergradient="finite_difference"))
    assert torch.allclose(found, expected, atol=1e-5)
    numeric = torch.zeros_like(alpha)
    for j in range(2):
        ends = []
        for sign in (1, -1):
            moved = alpha.detach().clone()
            moved[0, j] += sign * 1e-5
            ends.append(float(unrolled(moved)))
        numeric[0, j] = (ends[0] - ends[1]) / 2e-5
    assert torch.allclose(expected, numeric, atol=1e-8), "and of central differences"
    assert not torch.allclose(hypergradient(DifferentialSearch(2, 0)), expected, atol=1e-3)
    assert theta.tolist() == [0.5, -0.3], "θ is untouched by a step of α"


def test_at_the_start_of_lora_the_first_order_gradient_is_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    attach(model, LoRA(2))
    x = torch.randn(9, 4, dtype=D)
    search = DifferentialSearch(2, 0)
    params = [p for p in model.parameters() if p.requires_grad]
    state = search.step(
        search.init(ROWS, x),
        list(maps(model).values()),
        params,
        lambda b: model(b).square().mean(),
        lambda s: x,
        lambda s: x,
    )
    assert not state["logits"].any()


def run(
    rows: object = ROWS, share: float = 0.5, params: object = None, gated: bool = True
) -> object:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    attach(model, LoRA(2))
    trained = [p for p in model.parameters() if p.requires_grad] if params is None else params
    other = nn.Linear(4, 2)
    x = torch.randn(5, 4)
    return DifferentialSearch(3, 0)(
        maps(model),
        rows,  # type: ignore[arg-type]
        trained,  # type: ignore[arg-type]
        lambda b: (model if gated else other)(b).square().mean(),
        lambda s: x,
        lambda s: x,
        share=share,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run(share=0.0), r"share must lie in \(0, 1\], but got 0.0"),
        (lambda: run(share=1.5), "share must lie in"),
        (lambda: run([["0"], ["2", "1"]]), "rows must be of one length"),
        (lambda: run([["0", "5"]]), "unknown: \\['5'\\], known: 0, 2"),
        (lambda: run([["0", "0"]]), "name each module once"),
        (lambda: run(params=[]), "require grad"),
        (lambda: run(gated=False), "does not depend on any gate"),
        (lambda: DifferentialSearch(5, 5), "warm_up must lie in"),
        (lambda: DifferentialSearch(lr=0.0), "rates must be positive"),
        (lambda: DifferentialSearch(hypergradient="implicit"), "unknown hypergradient"),  # type: ignore[arg-type]
        (lambda: discretize(torch.full((1, 2), torch.nan), 0.5), "without NaN"),
        (lambda: gates(torch.zeros(3)), "logits must be a matrix"),
        (lambda: gates(torch.zeros(1, 3), "hard"), "relaxation must be"),  # type: ignore[arg-type]
        (lambda: stability([torch.ones(1, 2).bool()]), "at least two selections"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
