"""What an unrolled call leaves alone, refuses and reports: state, randomness, dtypes, bad input."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import optree
import pytest
import torch
import torchopt
from torch import Tensor, nn

from hypergrad import SGD, Adam, Forward, HigherUnrolled, Hyper, Problem, Status, Unrolled, train
from hypergrad.attention import math_attention
from hypergrad.randomness import RandomState
from tests.hypergrad.naive import error, vector
from tests.hypergrad.problems import CASES, Case, _dropout, module

MODES = ["graph", "replay", "segments"]


def run(case: Case, estimator: Any, **state: Any) -> Any:
    start = {**estimator.init(case.problem, case.params, case.hparams), **state}
    return estimator(case.problem, case.params, case.hparams, case.inner, case.outer, start)


@pytest.mark.parametrize("estimator", [Unrolled(SGD(0.1, 0.9), 4), Forward(SGD(0.1, 0.9), 4)])
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "tied_and_frozen"])
def test_arguments_are_untouched(name: str, estimator: Any) -> None:
    case = CASES[name]()
    given = [*optree.tree_leaves(case.params), *optree.tree_leaves(case.hparams)]
    before = [(t.detach().clone(), t._version, t.requires_grad) for t in given]
    buffers = {}
    if hasattr(case.problem, "module"):
        buffers = {k: b.clone() for k, b in case.problem.module.named_buffers()}
    found, _ = run(case, estimator)
    for t, (value, version, marked) in zip(given, before, strict=True):
        assert torch.equal(t, value)
        assert (t._version, t.requires_grad, t.grad) == (version, marked, None)
    for key, value in buffers.items():
        assert torch.equal(dict(case.problem.module.named_buffers())[key], value)  # type: ignore[attr-defined]
    marks = optree.tree_map(lambda t: t.requires_grad, case.params)
    assert optree.tree_map(lambda t: t.requires_grad, found.params) == marks
    assert all(t.is_leaf for t in optree.tree_leaves(found.params))


@pytest.mark.parametrize("mode", MODES)
def test_dropout_masks_are_those_of_training(mode: Any) -> None:
    """Recomputed steps see the first masks and draw nothing more; the next call sees others."""
    case, rule = module(_dropout, seeded=False), SGD(0.1)
    torch.manual_seed(5)
    plain = train(case.problem, case.params, case.hparams, rule, case.inner, 7).params
    case.problem.outer_loss(plain, case.hparams, case.outer)
    after_training = torch.get_rng_state()

    torch.manual_seed(5)
    graph, _ = run(case, Unrolled(rule, 7))
    torch.manual_seed(5)
    first, _ = run(case, Unrolled(rule, 7, memory=mode))
    assert torch.equal(vector(first.params), vector(plain))
    assert torch.equal(vector(first.grad), vector(graph.grad))
    assert torch.equal(torch.get_rng_state(), after_training)
    second, _ = run(case, Unrolled(rule, 7, memory=mode))
    assert not torch.equal(vector(second.params), vector(first.params))


def test_random_state_after_an_error_in_a_replay() -> None:
    """The state is put back where the forward pass left it."""
    case, states = CASES["mlp"](), []

    def inner(w: Any, h: Any, b: Any) -> Tensor:
        if len(states) == 5:
            raise KeyError("stop")
        noise = torch.rand(())
        states.append(torch.get_rng_state())
        return case.problem.inner_loss(w, h, b) + 0 * noise

    broken = replace(case, problem=Problem(inner, case.problem.outer_loss))
    with pytest.raises(KeyError, match="stop"):
        run(broken, Unrolled(SGD(0.1), 4, memory="replay"))
    assert torch.equal(torch.get_rng_state(), states[3])


def test_a_recomputed_loss_that_differs_is_an_error() -> None:
    case = CASES["mlp"]()
    stream = iter([{**case.inner, "x": case.inner["x"] * s} for s in torch.linspace(1, 2, 40)])
    moving = replace(case, inner=lambda t: next(stream))
    with pytest.raises(RuntimeError, match=r"inner_loss at step 4 was .* same batch for the same"):
        run(moving, Unrolled(SGD(0.1), 6, memory="replay"))


@pytest.mark.parametrize("estimator", [Unrolled, Forward])
def test_bfloat16_params(estimator: Any) -> None:
    """Steps in bfloat16 as torch.optim takes them, adjoints in float32, a float32 answer."""
    exact = CASES["mlp"]() if estimator is Unrolled else CASES["ridge"]()
    case = CASES["mlp"](torch.float32) if estimator is Unrolled else CASES["ridge"](torch.float32)
    narrow = replace(
        case,
        problem=Problem(
            lambda w, h, b: case.problem.inner_loss(optree.tree_map(torch.Tensor.float, w), h, b),
            lambda w, h, b: case.problem.outer_loss(optree.tree_map(torch.Tensor.float, w), h, b),
        ),
        params=optree.tree_map(lambda t: t.detach().bfloat16().requires_grad_(), case.params),
    )
    found, state = run(narrow, estimator(SGD(0.1, 0.9), 10))
    reference, _ = run(exact, estimator(SGD(0.1, 0.9), 10))
    assert {g.dtype for g in optree.tree_leaves(found.grad)} == {torch.float32}
    assert {p.dtype for p in optree.tree_leaves(found.params)} == {torch.bfloat16}
    assert state["optimizer"]["momentum_buffer"].dtype == torch.bfloat16
    assert error(found.grad, reference.grad) < 0.02


def test_bfloat16_hparams_get_float32_gradients() -> None:
    case = CASES["ridge"](torch.float32)
    h = optree.tree_map(lambda t: t.detach().bfloat16().requires_grad_(), case.hparams)
    found, _ = run(replace(case, hparams=h), Unrolled(SGD(0.1), 3))
    assert found.grad["log_wd"].dtype == torch.float32


def test_float32_is_close_to_float64() -> None:
    for rule in (SGD(0.1, 0.9), Adam(0.05, eps=1e-4)):
        single, _ = run(CASES["mlp"](torch.float32), Unrolled(rule, 10))
        double, _ = run(CASES["mlp"](), Unrolled(rule, 10))
        assert error(single.grad, double.grad) < 1e-4


def test_attention_runs_on_the_math_backend_and_the_switch_is_put_back() -> None:
    before = torch.backends.cuda.flash_sdp_enabled()
    found, _ = run(CASES["attention"](), Unrolled(SGD(0.1), 2))
    assert found.status is Status.EXACT
    assert torch.backends.cuda.flash_sdp_enabled() == before
    with math_attention(), math_attention():
        assert not torch.backends.cuda.flash_sdp_enabled()


def test_replay_is_exact_under_autocast() -> None:
    case = CASES["mlp"](torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph, _ = run(case, Unrolled(SGD(0.1), 4))
        replay, _ = run(case, Unrolled(SGD(0.1), 4, memory="replay"))
    assert torch.equal(vector(graph.grad), vector(replay.grad))


def test_state_is_storable() -> None:
    for rule in (SGD(0.1), SGD(0.1, 0.9), Adam(0.1), torchopt.adam(0.1)):
        case, estimator = CASES["mlp"](), Unrolled(rule, 2)
        first, state = run(case, estimator)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        a, b = (run(replace(case, params=first.params), estimator, **s) for s in (state, loaded))
        assert torch.equal(vector(a[0].grad), vector(b[0].grad))


def test_bad_configurations() -> None:
    for kind in (Unrolled, Forward, HigherUnrolled):
        for steps in (0, -1, 2.5, True):
            with pytest.raises(ValueError, match=rf"steps must be an integer .* got {steps}"):
                kind(SGD(0.1), steps)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"optimizer must be a hypergrad optimizer .* got str"):
            kind("sgd", 3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"Convert it with hypergrad\.from_torch"):
            kind(torch.optim.SGD([torch.zeros(1)]), 3)  # type: ignore[arg-type]
        assert kind(SGD(0.1), 3).steps == 3
    for truncation in (0, 4):
        with pytest.raises(ValueError, match=rf"truncation must be between 1 .* got {truncation}"):
            Unrolled(SGD(0.1), 3, truncation=truncation)
    with pytest.raises(ValueError, match=r"memory must be one of .* but got 'disk'"):
        Unrolled(SGD(0.1), 3, memory="disk")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Unrolled, Forward])
def test_bad_calls(kind: Any) -> None:
    case = CASES["ridge"]()
    with pytest.raises(ValueError, match="optimizer=None, which stands for the rule of an inner"):
        run(case, kind(None, 2))
    spare = {**case.hparams, "spare": torch.ones(2, requires_grad=True)}
    with pytest.raises(ValueError, match=r"hparams\['spare'\] enters neither .* nor the optimizer"):
        run(replace(case, hparams=spare), kind(SGD(0.1), 2))
    with pytest.raises(ValueError, match=r"state has entries \['momentum_buffer'\], but Adam"):
        run(case, kind(Adam(0.1), 2), optimizer={"momentum_buffer": None})
    with pytest.raises(ValueError, match=r"'momentum_buffer' has shape \(3,\), but these params"):
        run(case, kind(SGD(0.1, 0.9), 2), optimizer={"momentum_buffer": torch.zeros(3)})
    mixed = {"w": torch.ones(2, requires_grad=True), "v": torch.ones(2).double().requires_grad_()}
    with pytest.raises(ValueError, match=r"must share one dtype .* params\['w'\] is torch.float32"):
        run(replace(case, params=mixed), kind(SGD(0.1), 2))


@pytest.mark.parametrize("kind", [Unrolled, Forward])
def test_what_is_not_finite_is_named(kind: Any) -> None:
    w = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(2, requires_grad=True)}
    h = {"h": torch.ones((), requires_grad=True)}

    def case(inner: Any, outer: Any = lambda w, h, b: w["a"].sum() + w["b"].sum()) -> Case:
        return Case(Problem(inner, outer), w, h, None, None)

    diverging = case(lambda w, h, b: -h["h"] * (w["a"].pow(4).sum() + w["b"].sum()))
    with pytest.raises(FloatingPointError, match=r"(inner_loss is -inf|update) at step \d"):
        run(diverging, kind(SGD(0.5), 20))

    def kink(w: Any, h: Any, b: Any) -> Tensor:
        return h["h"] * ((w["b"] - w["b"].detach()).abs().sqrt().sum() + w["a"].sum())

    with pytest.raises(
        FloatingPointError, match=r"gradient of inner_loss at step 0 .* params\['b'"
    ):
        run(case(kink), kind(SGD(0.5), 3))
    with pytest.raises(FloatingPointError, match="outer_loss is nan"):
        run(
            case(lambda w, h, b: h["h"] * w["a"].sum(), lambda w, h, b: w["a"].sum() * torch.nan),
            kind(SGD(0.1), 1),
        )


def test_an_adjoint_that_is_not_finite_names_its_step() -> None:
    """torchopt's Adam has an infinite derivative of √v where an entry has had no gradient."""
    w = {"a": torch.ones(2, requires_grad=True)}
    h = {"h": torch.ones((), requires_grad=True)}
    mask = torch.tensor([1.0, 0.0])
    problem = Problem(
        lambda w, h, b: h["h"] * (mask * w["a"]).pow(2).sum(), lambda w, h, b: w["a"].sum()
    )
    case = Case(problem, w, h, None, None)
    with pytest.raises(FloatingPointError, match=r"adjoint of the params at step 2 .* params\['a'"):
        run(case, Unrolled(torchopt.adam(0.1), 3))
    ours, _ = run(case, Unrolled(Adam(0.1), 3))
    assert torch.isfinite(ours.grad["h"])


def test_random_state_captures_and_restores() -> None:
    state = RandomState.capture([torch.device("cpu")])
    first = torch.rand(3)
    state.restore()
    assert torch.equal(torch.rand(3), first)


def test_losses_without_a_second_derivative() -> None:
    """A loss linear in w has a constant gradient; h still enters it, and the optimizer."""
    w = {"w": torch.ones(3, dtype=torch.float64, requires_grad=True)}
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    slope = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    problem = Problem(lambda w, h, b: (slope * w["w"]).sum(), lambda w, h, b: w["w"].pow(2).sum())
    case = Case(problem, w, {"lr": lr}, None, None)
    for kind in (Unrolled, Forward):
        found, _ = run(case, kind(SGD(Hyper("lr")), 4))
        expected = (2 * (1 - 0.4 * slope) * (-4 * slope)).sum()
        assert found.grad["lr"].item() == pytest.approx(expected.item(), rel=1e-13)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_cuda(mode: Any) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Linear(8, 3)).cuda()
    case = module(lambda: net, torch.float32, seeded=False)
    batch = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in case.inner.items()}
    h = optree.tree_map(lambda t: t.detach().cuda().requires_grad_(), case.hparams)
    case = replace(case, inner=batch, outer=batch, hparams=h)
    torch.manual_seed(0)
    first, _ = run(case, Unrolled(Adam(0.01), 5))
    torch.manual_seed(0)
    second, _ = run(case, Unrolled(Adam(0.01), 5, memory=mode))
    assert error(second.grad, first.grad) < 1e-5
