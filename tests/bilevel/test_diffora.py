"""DiffoRA: gates, exact selections, hypergradients, and planted modules that are found."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adapters.reparam import attach, maps
from adapters.weights import HUT, LoRA
from benchmarks.core.diffora_planted import planted
from bilevel.diffora import DifferentialSearch, SearchState
from bilevel.selection import Selection, discretize, gates, layer_rows, of_modules, stability

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


@given(st.integers(1, 3), st.integers(1, 5), st.floats(0.05, 1.0), st.integers(0, 99))
def test_a_budget_is_kept_and_nothing_more_fits(
    layers: int, modules: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(layers, modules, generator=generator)
    sizes = torch.randint(1, 9, (layers, modules), generator=generator)
    mask = discretize(scores, share, "budget", sizes)
    left = share * float(sizes.sum()) - float(sizes[mask].sum())
    if left < -1e-6:  # not even the smallest fits
        assert mask.sum() == 1
        assert sizes[mask].item() == sizes.min()
    else:
        assert (sizes[~mask] > left - 1e-6).all()
        order = scores.flatten().argsort(descending=True)
        room = share * float(sizes.sum()) + 1e-9
        for i in order.tolist():
            size = float(sizes.flatten()[i])
            assert bool(mask.flatten()[i]) == (size <= room)
            room -= size if size <= room else 0.0
    assert discretize(scores, 1.0, "budget", sizes).all()


def test_rows_are_layers() -> None:
    names = [f"model.layers.{i}.{n}" for i in range(2) for n in ("attn.q", "attn.k", "up")]
    assert layer_rows(names) == [names[:3], names[3:]]
    assert layer_rows(names[:-1]) == [names[:-1]], "unequal layers make one row"
    assert layer_rows(["layers.0", "layers.1"]) == [["layers.0", "layers.1"]]
    assert layer_rows(["a", "b.c"]) == [["a", "b.c"]]


def test_entries_below_modules() -> None:
    named = {"0.w": 1, "0.a.w": 2, "01.w": 3, "1.w": 4}
    assert of_modules(named, ["0"]) == {"0.w": 1, "0.a.w": 2}


def test_ties_and_stability() -> None:
    assert discretize(torch.zeros(2, 4), 0.5).tolist() == [[True, True, False, False]] * 2
    a, b = discretize(torch.zeros(1, 4), 0.5), torch.tensor([[False, True, True, False]])
    assert stability([a, a]) == 1.0
    assert stability([a, b]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("hypergradient", ["first_order", "finite_difference", "score"])
def test_planted_modules_are_found_and_the_others_switched_off(hypergradient: str) -> None:
    for seed in range(2):
        wanted, found = planted(seed, LoRA(2), hypergradient=hypergradient)
        assert set(found.names) == wanted
        off = found.logits[~found.mask]
        assert off.max() < found.logits[found.mask].min()
        assert found.history.shape == (110, 1, 6)


def test_under_sgd_alpha_is_the_sum_of_its_gradients() -> None:
    target = torch.tensor([0.2, 0.4], dtype=D)
    theta = nn.Parameter(torch.tensor([0.5, -0.3], dtype=D))
    gated = [SimpleNamespace(gate=1.0), SimpleNamespace(gate=1.0)]

    def loss(_: object) -> Tensor:
        out = torch.stack([torch.as_tensor(each.gate) for each in gated]) * theta
        return (out - target).square().sum()

    search = DifferentialSearch(3, 0, gate_lr=0.7, gate_rule="sgd")
    state, alpha = search.init([["a", "b"]], theta), torch.zeros(1, 2, dtype=D)
    for _ in range(3):
        alpha = alpha.requires_grad_()
        value = (gates(alpha)[0] * theta.detach() - target).square().sum()
        alpha = (alpha - 0.7 * torch.autograd.grad(value, alpha)[0]).detach()
        state = search.step(state, gated, [theta], loss, lambda s: None, lambda s: None)
        assert torch.allclose(state["logits"], alpha, atol=1e-12)


def test_over_another_adapter() -> None:
    wanted, found = planted(3, HUT(2, std=0.5))
    assert set(found.names) == wanted


@pytest.mark.parametrize("relaxation", ["softmax", "sigmoid"])
def test_a_module_whose_output_nobody_reads_is_switched_off(relaxation: str) -> None:
    torch.manual_seed(0)
    dead, used = nn.Linear(4, 3), nn.Linear(4, 3)
    model = nn.ModuleDict({"dead": dead, "used": used}).double()
    attach(model, LoRA(2))
    x = torch.randn(60, 4, dtype=D)
    y = x @ torch.randn(4, 3, dtype=D)

    def loss(rows: range) -> Tensor:
        out = used(x[rows]) + 0.0 * dead(x[rows])
        return (out - y[rows]).square().mean()

    found = DifferentialSearch(60, 10, relaxation=relaxation)(  # type: ignore[arg-type]
        maps(model),
        [["dead", "used"]],
        [p for p in model.parameters() if p.requires_grad],
        loss,
        lambda step: range(30),
        lambda step: range(30, 60),
        share=0.5,
    )
    assert found.names == ["used"]
    parameters = found.parameters(model)
    assert list(parameters) == [f"used.parametrizations.weight.0.{n}" for n in "AB"]
    assert all(each.gate == 1.0 for each in maps(model).values())


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
            ends.append(float(unrolled(moved).detach()))
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


@pytest.mark.parametrize("hypergradient", ["first_order", "finite_difference", "score"])
def test_a_stored_search_goes_on_with_the_same_numbers(hypergradient: str) -> None:
    """Pieces of the search in a loop of one's own, with a break in the middle."""
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    search = DifferentialSearch(12, 2, hypergradient=hypergradient)  # type: ignore[arg-type]

    def start() -> tuple[nn.Module, list[nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        attach(model, LoRA(2))
        params = [p for p in model.parameters() if p.requires_grad]
        return model, params, torch.optim.Adam(params, search.lr)

    def run(broken: bool) -> SearchState:
        model, params, inner = start()
        state = search.init(ROWS, x)
        for step in range(12):
            if broken and step == 6:
                buffer = io.BytesIO()
                torch.save((state, model.state_dict(), inner.state_dict()), buffer)
                buffer.seek(0)
                model, params, inner = start()
                state, weights, moments = torch.load(buffer, weights_only=True)
                model.load_state_dict(weights), inner.load_state_dict(moments)

            def loss(rows: slice, model: nn.Module = model) -> Tensor:
                return (model(x[rows]) - x[rows, :2]).square().mean()

            gated = list(maps(model).values())
            state = search.step(
                state,
                gated,
                params,
                loss,
                lambda s: slice(s, s + 9),
                lambda s: slice(20 + s, 30 + s),
            )
            for each, value in zip(gated, search.gates(state).flatten(), strict=True):
                each.gate = value
            inner.zero_grad(), loss(slice(step, step + 9)).backward(), inner.step()
        return state

    one, two = run(False), run(True)
    assert torch.equal(torch.stack(one["history"]), torch.stack(two["history"]))
    assert len(one["history"]) == 10
    assert search.selection(one, ROWS, 0.5).names == search.selection(two, ROWS, 0.5).names


@pytest.mark.parametrize("hypergradient", ["first_order", "finite_difference", "score"])
@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_loss_that_is_not_finite_is_named_and_nothing_is_lost(
    hypergradient: str, split: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    attach(model, LoRA(2))
    params = [p for p in model.parameters() if p.requires_grad]
    good, bad = torch.randn(5, 4), torch.full((5, 4), torch.nan)
    search = DifferentialSearch(9, 1, hypergradient=hypergradient)  # type: ignore[arg-type]
    batches = {
        name: lambda step, name=name: bad if (name, step) == (split, 5) else good
        for name in ("training", "validation")
    }
    with pytest.raises(
        FloatingPointError, match=f"the {split} loss of the search is nan at step 5"
    ):
        search(
            maps(model),
            ROWS,
            params,
            lambda b: model(b).square().mean(),
            batches["training"],
            batches["validation"],
            share=0.5,
        )
    assert all(p.isfinite().all() for p in params)
    assert all(each.gate == 1.0 for each in maps(model).values())


def run(
    rows: object = ROWS,
    share: float = 0.5,
    params: object = None,
    gated: bool = True,
    modules: object = None,
) -> object:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    attach(model, LoRA(2))
    trained = [p for p in model.parameters() if p.requires_grad] if params is None else params
    other = nn.Linear(4, 2)
    x = torch.randn(5, 4)
    return DifferentialSearch(3, 0)(
        maps(model) if modules is None else modules,  # type: ignore[arg-type]
        rows,  # type: ignore[arg-type]
        trained,  # type: ignore[arg-type]
        lambda b: (model if gated else other)(b).square().mean(),
        lambda s: x,
        lambda s: x,
        share=share,
    )


def chosen(*names: str) -> Selection:
    return Selection(torch.zeros(1, 1), torch.ones(1, 1).bool(), list(names), torch.zeros(0, 1, 1))


def test_modules_without_a_gate() -> None:
    with pytest.raises(TypeError, match="modules must have a gate, but 0 have none"):
        run(rows=[["0"]], modules={"0": object()})


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
        (lambda: run(modules={}), "there are no candidate modules: modules is empty"),
        (lambda: run(rows=[]), "rows must be of one length"),
        (lambda: layer_rows([]), "there are no candidate modules: names is empty"),
        (lambda: discretize(torch.full((1, 2), torch.nan), 0.5), "without NaN"),
        (lambda: discretize(torch.zeros(1, 2), 0.5, "best"), "scope must be"),  # type: ignore[arg-type]
        (lambda: discretize(torch.zeros(1, 2), 0.5, "budget"), "needs positive sizes"),
        (lambda: discretize(torch.zeros(1, 0), 0.5), "scores must be a matrix"),
        (lambda: DifferentialSearch(gate_rule="rmsprop"), "gate_rule must be 'adam' or 'sgd'"),  # type: ignore[arg-type]
        (lambda: DifferentialSearch(scope="best"), "scope must be"),  # type: ignore[arg-type]
        (lambda: DifferentialSearch(relaxation="hard"), "relaxation must be"),  # type: ignore[arg-type]
        (lambda: chosen("0").parameters(nn.Linear(1, 1)), "no parameter of 0 requires grad"),
        (lambda: gates(torch.zeros(3)), "logits must be a matrix"),
        (lambda: gates(torch.zeros(1, 3), "hard"), "relaxation must be"),  # type: ignore[arg-type]
        (lambda: stability([torch.ones(1, 2).bool()]), "at least two selections"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
