"""A non-convex lower level: per-layer weight decay of an MLP on noisy digits, MAID and Descent.

    OMP_NUM_THREADS=1 python benchmarks/maid/network.py [cost] [seeds]

MLP 64-32-10 (tanh), 300 training rows with 30 % wrong labels, 300 validation and 500 test rows with
right ones; log decay of each of the 4 tensors.  No constant is certified here: μ = 0.05 is a
guess (the smallest penalty, a bound on nothing either, asks for 50 times the accuracy), and the
estimate test looks at the goal-oriented error.  What is compared is the
hyperparameters found at equal cost: a fresh network is trained on each to convergence.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from common import Curve, plot, run, table, write
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bilevel import Descent, Grad, Space
from bilevel.inexact import HOAG, LBFGS, MAID, SmoothInner, Smoothness
from bilevel.single_loop import Decay
from hypergrad import CG, SGD, Implicit, Unrolled, module_problem

Data = tuple[Tensor, Tensor]


def splits(seed: int) -> tuple[Data, Data, Data]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    x = torch.from_numpy(digits.data / 16.0)[order]
    y = torch.from_numpy(digits.target)[order].long()
    wrong = torch.rand(300, generator=generator) < 0.3
    noisy = torch.where(wrong, torch.randint(0, 10, (300,), generator=generator), y[:300])
    return (x[:300], noisy), (x[300:600], y[300:600]), (x[600:1100], y[600:1100])


def make(seed: int, init: float) -> SmoothInner:
    train, val, test = splits(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()

    def error(module: nn.Module, hparams: Any, batch: Data) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    def penalized(module: nn.Module, hparams: Any, batch: Data) -> Tensor:
        sizes = torch.stack([p.square().sum() for p in module.parameters()])
        return error(module, hparams, batch) + 0.5 * hparams["log_decay"].exp() @ sizes

    problem, params = module_problem(net, penalized, error)
    smoothness = Smoothness(mu=0.05, L=10.0, L_g=1.0, assumed=("mu", "L", "L_g"))
    return SmoothInner(
        problem,
        params,
        smoothness,
        space=Space(log_decay=Grad(init, low=-12.0, high=1.0, shape=(4,))),
        inner_batch=train,
        outer_batch=val,
        test_batch=test,
        optimizer=SGD(lr=0.5, momentum=0.9),
    )


def retrained(seed: int, theta: Tensor, init: float) -> tuple[float, float]:
    """Validation and test loss of a fresh network trained to convergence at fixed penalties."""
    inner = make(seed + 1000, init)
    other = make(seed, init)
    tensors = [p.detach().clone().requires_grad_() for p in inner.params.values()]
    names = list(inner.params)

    def objective(vector: Any) -> tuple[float, Any]:
        flat = torch.from_numpy(vector.copy())
        pieces = torch.split(flat, [t.numel() for t in tensors])
        leaves = {
            n: p.reshape(t.shape).detach().requires_grad_()
            for n, p, t in zip(names, pieces, tensors, strict=True)
        }
        loss = other.problem.inner_loss(leaves, {"log_decay": theta}, other.inner_batches(1)[0])
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return float(loss.detach()), torch.cat([g.flatten() for g in grads]).numpy()

    start = torch.cat([t.detach().flatten() for t in tensors]).numpy()
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 400})
    pieces = torch.split(torch.from_numpy(found.x), [t.numel() for t in tensors])
    shaped = [p.reshape(t.shape).requires_grad_() for p, t in zip(pieces, tensors, strict=True)]
    other.adopt(dict(zip(names, shaped, strict=True)), None, 0)
    return other.evaluate("val")["loss"], other.evaluate("test")["loss"]


def main(cost: int, seeds: int) -> None:
    torch.set_num_threads(1)
    shared: dict[str, Any] = {
        "solver": LBFGS(), "eps": 0.1, "delta": 0.01, "damping": 0.05, "lam": 1e-4, "eta": 0.1,
        "barzilai_borwein": True, "nonmonotone": 0.85, "lower_cap": 300, "work": 600,
    }  # fmt: skip
    arms: list[tuple[str, Any]] = [
        ("MAID estimate", MAID(descent_test="estimate", **shared)),
        ("MAID off", MAID(descent_test="off", **shared)),
        ("HOAG k^-2", HOAG(solver=LBFGS(), damping=0.05, schedule=Decay(0.1, 2.0), lower_cap=300)),
        ("Descent, CG 10, 20 steps", Descent(Implicit(CG(max_iter=10)), lr=0.1, inner_steps=20)),
        ("Descent, CG 5, 5 steps", Descent(Implicit(CG(max_iter=5)), lr=0.1, inner_steps=5)),
        ("Descent, unrolled 10", Descent(Unrolled(steps=10), lr=0.1)),
    ]
    rows: list[list[Any]] = []
    drawn: list[Curve] = []
    for init in (-7.0, -4.0):
        before = [retrained(s, torch.full((4,), init, dtype=torch.float64), init)
                  for s in range(seeds)]  # fmt: skip
        rows.append([init, "not tuned", "-", "-", _spread([b[0] for b in before]),
                     _spread([b[1] for b in before]), "-", "-"])  # fmt: skip
        for name, algorithm in arms:
            curves = [
                run(f"{name}, {init:g}, {s}", lambda s=s, i=init: make(s, i), algorithm, cost)
                for s in range(seeds)
            ]
            results = [c.result for c in curves if c.result is not None]
            fresh = [retrained(s, r.hparams["log_decay"], init) for s, r in enumerate(results)]
            own = [(r.test or {})["loss"] for r in results]
            means = torch.stack([r.hparams["log_decay"] for r in results]).mean(0)
            rows.append([
                init, name, _spread([c.loss[-1] for c in curves]), _spread(own),
                _spread([f[0] for f in fresh]), _spread([f[1] for f in fresh]),
                " ".join(f"{v:.1f}" for v in means), f"{sum(c.seconds for c in curves):.0f}",
            ])  # fmt: skip
            print(rows[-1], flush=True)
            curves[0].name = f"{name}, θ₀ = {init:g}"
            drawn.append(curves[0])
    text = (
        f"{seeds} seeds (split, wrong labels, weights), mean ± standard deviation; cost {cost}. "
        "“run”: at the end of the run; “fresh”: a network trained from another initialization, to "
        "convergence, at the hyperparameters found.\n\n"
        + table(
            ["θ₀", "arm", "val CE, run", "test CE, run", "val CE, fresh", "test CE, fresh",
             "log decays", "s"],
            rows,
        )
    )  # fmt: skip
    title = "MAID on a non-convex network"
    write("maid_network", title, f"python benchmarks/maid/network.py {cost} {seeds}", text)

    def panel(init: str) -> Any:
        def draw(axis: Any) -> None:
            for curve in (c for c in drawn if c.name.endswith(init)):
                axis.plot(curve.cost, curve.loss, lw=1.1, label=curve.name)
            axis.set(xlabel="cost", ylabel="validation CE", title=f"θ₀ = {init}, seed 0")
            axis.legend(fontsize=6)

        return draw

    plot("maid_network.png", [panel("-7"), panel("-4")])


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 4000,
        int(sys.argv[2]) if len(sys.argv) > 2 else 3,
    )
