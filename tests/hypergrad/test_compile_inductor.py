"""Estimators through inductor itself; what it is given is tested in `test_compile`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from hypergrad import CG, SGD, Adam, Hyper, Implicit, Neumann, Unrolled, module_problem
from hypergrad.compiled.cache import PROGRAMS
from hypergrad.compiled.graph import compile_graph, trace
from hypergrad.compiled.products import rewrite_products
from tests.hypergrad.naive import error, with_optimizer_hparams
from tests.hypergrad.problems import CASES, SOLVED, Case, trained


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    PROGRAMS.clear()
    yield
    PROGRAMS.clear()


def agree(case: Case, estimator: Any, tol: float = 1e-10) -> None:
    """Check a compiled estimator against eager, when compiled and from the cache."""
    arguments = (case.problem, case.params, case.hparams, case.inner, case.outer)
    state = estimator.init(*arguments[:3])
    expected, _ = replace(estimator, compile="off")(*arguments, state)
    for cached in (False, True):
        found, _ = estimator(*arguments, state)
        assert found.compiled.reason is None
        assert found.compiled.cached is cached
        assert error(found.grad, expected.grad) < tol
        assert error(found.params, expected.params) < tol
        assert found.status is expected.status


@pytest.mark.slow
def test_unrolled() -> None:
    case = with_optimizer_hparams(
        SOLVED["ridge"](), lr=torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    )
    agree(case, Unrolled(SGD(Hyper("lr"), 0.8), 8, compile="step"))


def test_implicit() -> None:
    agree(SOLVED["ridge"](), Implicit(CG(rtol=1e-12, max_iter=20), compile="solve"))


def test_rewritten_products_are_the_same_products() -> None:
    """Also where the memory order is not that of rows, and with a sum."""
    shapes = ((40, 9), (9, 3), (40, 3), (9,))
    a, b, c, v = (torch.randn(s, dtype=torch.float64) for s in shapes)

    def function(a: Tensor, b: Tensor, c: Tensor, v: Tensor) -> list[Tensor]:
        row, column = v[None], v[:, None]
        sums = [torch.addmm(c, a, b, alpha=3), torch.addmm(v, c, b.T), torch.addmm(c, a, b, beta=2)]
        return [a @ b, a.T @ c, b @ c.T, *sums, a @ column, row @ a.T, b.T @ column]

    traced = trace(function, [a, b, c, v])
    before = [str(n.target) for n in traced.module.graph.nodes]
    rewrite_products(traced.module)
    after = [str(n.target) for n in traced.module.graph.nodes]
    assert (before.count("aten.mm.default"), after.count("aten.mm.default")) == (6, 5)
    assert (before.count("aten.addmm.default"), after.count("aten.addmm.default")) == (3, 1)
    assert after.count("aten.sum.dim_IntList") == 3
    for found, expected in zip(traced.module(a, b, c, v), function(a, b, c, v), strict=True):
        assert torch.allclose(found, expected, rtol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "mode"), [("sgd", "step"), ("adam", "chunk")])
def test_per_parameter_decay(rule: str, mode: Any) -> None:
    case = CASES["mlp"]()
    decay = {k: torch.full_like(p, 0.05).requires_grad_() for k, p in case.params.items()}
    numbers = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-2}
    if rule == "sgd":
        numbers = {"lr": 0.1, "momentum": 0.8}
    scalars = {k: torch.tensor(v).double().requires_grad_() for k, v in numbers.items()}
    case = with_optimizer_hparams(case, decay=decay, **scalars)
    optimizer: Any = SGD(Hyper("lr"), Hyper("momentum"), weight_decay=Hyper("decay"))
    if rule == "adam":
        betas = (Hyper("beta1"), Hyper("beta2"))
        optimizer = Adam(Hyper("lr"), betas, Hyper("eps"), Hyper("decay"))
    for memory in ("graph", "replay"):
        agree(case, Unrolled(optimizer, 10, memory=memory, compile=mode))
        PROGRAMS.clear()


@pytest.mark.slow
def test_a_convolutional_network() -> None:
    """Inductor passes intermediate results of convolutions channels last."""
    dtype = torch.float64
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(24, 10)),
    ).to(dtype)

    def loss(m: nn.Module, h: Any, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1])

    problem, params = module_problem(net, loss, loss)
    hparams = trained({"wd": {k: torch.full_like(p, 1e-2) for k, p in params.items()}})
    batches = [(torch.randn(20, 1, 8, 8, dtype=dtype), torch.randint(0, 10, (20,))) for _ in "ab"]
    case = Case(problem, params, hparams, *batches)
    agree(case, Unrolled(SGD(0.1, 0.9, weight_decay=Hyper("wd")), 5, compile="chunk"))


@pytest.mark.slow
def test_implicit_by_steps() -> None:
    agree(SOLVED["softmax_ridge"](), Implicit(Neumann(terms=50), compile="step"))
    agree(SOLVED["softmax_ridge"](dtype=torch.float32), Implicit(CG(), compile="solve"), 1e-4)


@pytest.mark.slow
def test_the_next_process_finds_the_graphs_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from hypergrad import SGD, Unrolled\n"
        "from tests.hypergrad.problems import CASES\n"
        "from torch._dynamo.utils import counters\n"
        "case, estimator = CASES['ridge'](), Unrolled(SGD(0.1), 5, compile='step')\n"
        "state = estimator.init(case.problem, case.params, case.hparams)\n"
        "arguments = case.problem, case.params, case.hparams, case.inner, case.outer\n"
        "found, _ = estimator(*arguments, state)\n"
        "assert found.compiled.reason is None, found.compiled\n"
        "print(counters['inductor']['fxgraph_cache_hit'])"
    )
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hits = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [int(run.stdout.split()[-1]) for run in hits] == [0, 2]


def test_a_graph_reads_captured_tensors_at_each_call() -> None:
    factor = torch.ones(3)
    traced = trace(lambda x: [factor * x], [torch.ones(3)])
    graph = compile_graph(traced)
    factor.fill_(2.0)
    assert torch.equal(graph([torch.ones(3)])[0], torch.full((3,), 2.0))
