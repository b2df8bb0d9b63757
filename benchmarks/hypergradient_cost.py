"""Cost of a hypergradient in units of plain training, on the digits network.

    OMP_NUM_THREADS=1 python benchmarks/hypergradient_cost.py [repeats]

A perceptron 64-100-10 on digits, batch 128, float32, one thread; one weight decay for each of its
7,510 parameters.  CPU time (user + system), medians over interleaved repeats.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters import tasks
from hypergrad import CG, SGD, Hyper, Implicit, Problem, Unrolled, module_problem

STEPS, ITERATIONS = 100, 20


def cpu_time(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main(repeats: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = tasks.get("digits")
    train, val = task.split("train"), task.split("val")
    batches = [
        {k: v[torch.randint(0, len(v), (128,))] for k, v in train.items()} for _ in range(STEPS)
    ]
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 10))
    names = [name for name, _ in net.named_parameters()]

    def error(module: nn.Module, hparams: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch["x"]), batch["y"])

    def penalized(
        module: nn.Module, hparams: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> Tensor:
        named = dict(module.named_parameters())
        return error(module, hparams, batch) + sum(
            (hparams[n].exp() * named[n].square()).sum() for n in names
        )

    def logs() -> dict[str, Tensor]:
        return {n: torch.full_like(p, -7.0).requires_grad_() for n, p in net.named_parameters()}

    bare, params = module_problem(net, error, error)
    with_penalty, _ = module_problem(net, penalized, error)
    decays = {"decay": {n: torch.full_like(p, 1e-3).requires_grad_() for n, p in params.items()}}

    def plain() -> None:
        net_params = [p.detach().clone().requires_grad_() for p in params.values()]
        optimizer = torch.optim.SGD(net_params, lr=0.1, momentum=0.9, weight_decay=1e-3)
        for batch in batches:
            optimizer.zero_grad()
            bare.inner_loss(dict(zip(names, net_params, strict=True)), {}, batch).backward()
            optimizer.step()

    def plain_gradient() -> None:
        hparams = logs()
        for _ in range(20):
            loss = with_penalty.inner_loss(params, hparams, batches[0])
            torch.autograd.grad(loss, list(params.values()))

    def call(
        estimator: Implicit | Unrolled, problem: Problem, hparams: object, batch: object
    ) -> None:
        estimator(problem, params, hparams, batch, val, estimator.init(problem, params, hparams))

    rule = SGD(lr=0.1, momentum=0.9, weight_decay=Hyper("decay"))
    unrolled = {m: Unrolled(rule, STEPS, memory=m) for m in ("graph", "replay", "segments")}
    implicit = Implicit(CG(rtol=0.0, max_iter=ITERATIONS, damping=1.0))
    runs: dict[str, Callable[[], object]] = {
        "plain": plain,
        "gradient": plain_gradient,
        "implicit": lambda: call(implicit, with_penalty, logs(), batches[0]),
        **{
            m: (lambda e=e: call(e, bare, decays, batches.__getitem__))  # type: ignore[misc]
            for m, e in unrolled.items()
        },
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(cpu_time(run))
    median = {name: statistics.median(t[1:]) for name, t in times.items()}  # the first warms up
    gradient, steps = median["gradient"] / 20, median["plain"]
    print(f"torch {torch.__version__}, {repeats} repeats, medians of CPU time, one thread\n")
    print("| what | ms | multiple |\n| --- | ---: | ---: |")
    print(f"| one gradient of the penalized loss | {1e3 * gradient:.2f} | 1 gradient |")
    print(
        f"| Implicit, CG with {ITERATIONS} iterations | {1e3 * median['implicit']:.1f} | "
        f"{median['implicit'] / gradient:.1f} gradients |"
    )
    print(f"| {STEPS} plain steps of torch.optim.SGD, momentum | {1e3 * steps:.0f} | 1 training |")
    for memory in unrolled:
        print(
            f"| Unrolled({STEPS}), memory={memory!r} | {1e3 * median[memory]:.0f} | "
            f"{median[memory] / steps:.2f} × training |"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
