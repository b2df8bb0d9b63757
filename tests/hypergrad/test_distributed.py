"""Two processes with half of the batch each have the hypergradient of one with all of it."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from hypergrad import CG, SGD, Adam, Hyper, Implicit, Problem, Solver, Unrolled
from hypergrad.distributed import mean_loss
from hypergrad.tree import zeros_for_none

N = 16


def data() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Training and validation (x, y, index)."""
    g = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(N, 4, generator=g, dtype=torch.float64),
            torch.randint(0, 3, (N,), generator=g),
            torch.arange(N),
        )
        for _ in range(2)
    ]


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def inner(net: nn.Module, batch: Any, hparams: Any) -> Tensor:
    """Sample weights, of which each process uses its half, and a decay per parameter."""
    x, y, index = batch
    losses = F.cross_entropy(net(x), y, reduction="none")
    penalty = sum((hparams["decay"][k].exp() * p.square()).sum() for k, p in net.named_parameters())
    return (torch.sigmoid(hparams["weight"][index]) * losses).mean() + penalty


def outer(net: nn.Module, batch: Any, hparams: Any) -> Tensor:
    """Depends on hyperparameters directly too."""
    x, y, index = batch
    direct = hparams["weight"][index].square().mean()
    return F.cross_entropy(net(x), y) + direct


def hyper(net: nn.Module) -> dict[str, Any]:
    return {
        "weight": torch.linspace(-1, 1, N, dtype=torch.float64).requires_grad_(),
        "decay": {k: torch.full_like(p, -1.0).requires_grad_() for k, p in net.named_parameters()},
        "lr": torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
    }


SOLVERS: dict[str, dict[str, Any]] = {
    "unrolled": {"lr": Hyper("lr"), "momentum": 0.9, "method": Unrolled(steps=5)},
    "replay": {"lr": Hyper("lr"), "method": Unrolled(steps=5, memory="replay")},
    "implicit": {"lr": 0.2, "momentum": 0.9, "method": Implicit(CG(rtol=1e-12)), "steps": 60},
}


def hypergradient(kind: str, wrap: Any, train: Any, val: Any) -> Any:
    """The loss and all gradients through a `Solver`."""
    net = model()
    hparams = hyper(net)
    solve = Solver(net, wrap(inner), torch.optim.SGD, **SOLVERS[kind])
    loss = wrap(outer)(solve(train, hparams), val, hparams)
    loss.backward()
    leaves = [hparams["weight"], hparams["lr"], *hparams["decay"].values(), *net.parameters()]
    return [loss.detach(), *zeros_for_none([t.grad for t in leaves], leaves)]


def second_order(wrap: Any, train: Any, val: Any) -> Any:
    """A derivative of a hypergradient, as a third level takes it."""
    net = model()
    hparams = hyper(net)
    solve = Solver(net, wrap(inner), torch.optim.SGD, **SOLVERS["unrolled"])
    loss = wrap(outer)(solve(train, hparams), val, hparams)
    weight, lr = hparams["weight"], hparams["lr"]
    first = torch.autograd.grad(loss, [weight, lr], create_graph=True)
    second = torch.autograd.grad(first[0].square().sum() + first[1] ** 2, [weight, lr])
    return [*[t.detach() for t in first], *second]


def by_problem(wrap: Any, train: Any, val: Any) -> Any:
    """The estimators, on trees of tensors."""

    def squares(params: Any, hparams: Any, batch: Any) -> Tensor:
        error = (batch[0] @ params["w"] - batch[1]).square()
        return (torch.sigmoid(hparams["weight"][batch[2]]) * error).mean()

    def error(params: Any, hparams: Any, batch: Any) -> Tensor:
        return (batch[0] @ params["w"] - batch[1]).square().mean()

    problem = Problem(wrap(squares), wrap(error))
    params = {"w": torch.zeros(4, dtype=torch.float64, requires_grad=True)}
    hparams = {"weight": torch.linspace(-1, 1, N, dtype=torch.float64).requires_grad_()}
    found = []
    for estimator in (Unrolled(Adam(lr=0.1), 4), Unrolled(SGD(lr=0.1), 4, memory="forward")):
        state = estimator.init(problem, params, hparams)
        found += [estimator(problem, params, hparams, train, val, state)[0].grad["weight"]]
    return found


CASES = {
    **{kind: partial(hypergradient, kind) for kind in SOLVERS},
    "second order": second_order,
    "problem": by_problem,
}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    half = [tuple(t[rank::2] for t in batch) for batch in data()]
    torch.save({k: f(mean_loss, *half) for k, f in CASES.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    other = torch.multiprocessing.get_context("spawn").Process(
        target=process, args=(1, str(folder))
    )
    other.start()
    process(0, str(folder))
    other.join()
    assert other.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(found: list[dict[str, Any]], case: str) -> None:
    expected = CASES[case](lambda loss: loss, *data())
    for process_found in found:
        torch.testing.assert_close(process_found[case], expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(*(process_found[case] for process_found in found), strict=True):
        assert torch.equal(a, b)  # so that copies of the hyperparameters never drift apart


def test_a_loss_without_processes_is_refused() -> None:
    with pytest.raises(RuntimeError, match="init_process_group first"):
        mean_loss(lambda: torch.zeros(()))()
