"""Traps that a module brings: buffers, attention, autocast, torch.compile; see `test_traps`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypergrad import (
    BOME,
    F2SA,
    PBGD,
    PZOBO,
    SAMA,
    SGD,
    Adam,
    FiniteDifference,
    Forward,
    HigherUnrolled,
    Implicit,
    Neumann,
    Unrolled,
    module_problem,
    train,
)
from tests.hypergrad.naive import directional, error, vector
from tests.hypergrad.problems import CASES, Case, module

RULE = SGD(0.1, 0.9)
MODES = [Unrolled(RULE, 5, memory=m) for m in ("graph", "replay", "segments")]
ESTIMATORS: list[Any] = [
    *MODES,
    Unrolled(RULE, 4, truncation=2),
    Forward(RULE, 2),
    HigherUnrolled(RULE, 2),
    Implicit(Neumann()),
    FiniteDifference(),
    SAMA(RULE, 2),
    PZOBO(RULE, 2),
    F2SA(RULE, 2),
    BOME(RULE, 2),
    PBGD(RULE, 2),
]


def run(case: Case, estimator: Any) -> Any:
    start = estimator.init(case.problem, case.params, case.hparams)
    return estimator(case.problem, case.params, case.hparams, case.inner, case.outer, start)[0]


def central_difference(case: Case, along: Any, steps: int) -> float:
    def outer(hparams: Any) -> float:
        w = train(case.problem, case.params, hparams, RULE, case.inner, steps).params
        return float(case.problem.outer_loss(w, hparams, case.outer).detach())

    return directional(outer, case.hparams, along, step=1e-3)


def fewer_hparams(case: Case) -> Case:
    """One weight decay per tensor instead of one per element."""
    hparams = {k: h.detach().mean().requires_grad_() for k, h in case.hparams.items()}
    return replace(case, hparams=hparams)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: str(e)[:40])
def test_batch_norm_statistics_do_not_advance(estimator: Any) -> None:
    case = fewer_hparams(CASES["batch_norm"]())
    net: nn.Module = case.problem.module  # type: ignore[attr-defined]
    before = {k: b.clone() for k, b in net.named_buffers()}
    assert "1.num_batches_tracked" in before
    run(case, estimator)
    for key, buffer in net.named_buffers():
        assert torch.equal(buffer, before[key])


def _spectral() -> nn.Module:
    constrained = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5), n_power_iterations=1)
    return nn.Sequential(constrained, nn.Tanh(), nn.Linear(5, 3))


def test_a_replay_starts_from_the_same_buffers() -> None:
    """Spectral norm takes a power iteration in a buffer at each forward pass in train mode."""
    case = module(_spectral)
    net: nn.Module = case.problem.module  # type: ignore[attr-defined]
    before = {k: b.clone() for k, b in net.named_buffers()}
    graph, *others = (run(case, estimator) for estimator in MODES)
    for other in others:
        assert torch.equal(vector(other.grad), vector(graph.grad))
    assert before
    for key, buffer in net.named_buffers():
        assert torch.equal(buffer, before[key])


class Encoder(nn.Module):
    """A transformer layer with its dropout, over three tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x.unflatten(1, (3, 2)).repeat(1, 1, 2)).mean(1))
        return out


@pytest.mark.parametrize("training", [True, False])
def test_attention_has_a_second_derivative_whatever_backend_is_chosen(training: bool) -> None:
    """In eval mode the layer has a fused path of its own, in train mode dropout in attention."""
    case = fewer_hparams(module(Encoder))
    net: nn.Module = case.problem.module  # type: ignore[attr-defined]
    net.train(training)
    torch.manual_seed(1)
    along = optree.tree_map(torch.randn_like, case.hparams)
    expected = central_difference(case, along, 5)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        for estimator in (MODES[0], MODES[1], HigherUnrolled(RULE, 5)):
            found = float(vector(run(case, estimator).grad) @ vector(along))
            assert found == pytest.approx(expected, rel=1e-6)
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize("rule", [RULE, Adam(0.01, eps=1e-3)], ids=["sgd", "adam"])
def test_autocast_around_the_loss(rule: Any) -> None:
    """bfloat16 inside of the loss: float32 params and answers, right to bfloat16's two digits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(2, 64, 6), torch.randint(3, (2, 64))

    def case(narrow: bool) -> Case:
        def data(net: nn.Module, i: int) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                z = net(x[i])
            assert z.dtype == (torch.bfloat16 if narrow else torch.float32)
            return F.cross_entropy(z.float(), y[i])

        def inner(net: nn.Module, h: Any, i: int) -> Tensor:
            decay = sum((h[k].exp() * p**2).sum() for k, p in net.named_parameters())
            return data(net, i) + decay

        problem, params = module_problem(net, inner, lambda net, h, i: data(net, i))
        hparams = {k: torch.tensor(-5.0, requires_grad=True) for k in params}
        return Case(problem, params, hparams, 0, 1)

    exact = run(case(False), Unrolled(rule, 10)).grad
    graph = run(case(True), Unrolled(rule, 10, memory="graph"))
    replay = run(case(True), Unrolled(rule, 10, memory="replay"))
    forward = run(case(True), Forward(rule, 10))
    patched = run(case(True), HigherUnrolled(rule, 10))
    assert torch.equal(vector(replay.grad), vector(graph.grad))
    for found in (graph, forward, patched):
        assert {g.dtype for g in optree.tree_leaves(found.grad)} == {torch.float32}
        assert {p.dtype for p in optree.tree_leaves(found.params)} == {torch.float32}
        assert 1e-5 < error(found.grad, exact) < 0.03
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = run(case(True), Unrolled(rule, 10))
    assert error(outside.grad, exact) < 0.03


@pytest.mark.parametrize("how", ["module", "in place"])
def test_a_compiled_module_is_differentiated_twice(how: str) -> None:
    """A graph of torch.compile has no double backward: the inner loss runs the module's code."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3)

    def case(net: Any) -> Case:
        problem, params = module_problem(
            net,
            lambda m, h, b: m(x).pow(2).mean() * h["s"],
            lambda m, h, b: (m(x) - 1).pow(2).mean(),
        )
        hparams = {"s": torch.ones((), dtype=torch.float64, requires_grad=True)}
        return Case(problem, params, hparams, None, None)

    net: Any = make()
    if how == "module":
        net = torch.compile(net, backend="aot_eager")
    else:
        net.compile(backend="aot_eager")
    for estimator in (*MODES, Forward(RULE, 3), Implicit(Neumann()), FiniteDifference()):
        found, expected = (run(case(n), estimator) for n in (net, make()))
        assert found.grad["s"].item() == pytest.approx(expected.grad["s"].item(), rel=1e-12)
    with pytest.raises(TypeError, match=r"HigherUnrolled patches .* compiled by torch\.compile"):
        run(case(net), HigherUnrolled(RULE, 3))
