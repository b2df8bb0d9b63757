"""Nested problems shared by the tests of the estimators, each small enough for float64 checks.

`CASES` maps a name to ``make(dtype=torch.float64) -> Case``.  Cases with `minimize` and
`hypergradient` are solved in closed form or by Newton's method with hand-written derivatives,
so that they share nothing with autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from hypergrad import Problem, module_problem

Tree = Any


@dataclass(frozen=True)
class Case:
    """A problem with a starting point, batches, and its exact answer where there is one."""

    problem: Problem
    params: Tree
    hparams: Tree
    inner: Any
    outer: Any
    minimize: Callable[[Tree], Tree] | None = None
    """w*(h), as a tree that requires grad."""
    hypergradient: Callable[[Tree], Tree] | None = None
    """dF/dh of F(w*(h), h)."""


def trained(tree: Tree) -> Tree:
    """A detached copy in which every leaf requires grad."""
    return optree.tree_map(lambda t: t.detach().clone().requires_grad_(), tree)


def _normal(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def ridge(dtype: torch.dtype = torch.float64) -> Case:
    """f = ‖Xw − y‖²/2n + Σ eʰʲ wⱼ²/2,  F = ‖X'w − y'‖²/2n'.  H = XᵀX/n + diag(eʰ)."""
    x, y = _normal(0, 20, 6, dtype=dtype), _normal(1, 20, dtype=dtype)
    xv, yv = _normal(2, 15, 6, dtype=dtype), _normal(3, 15, dtype=dtype)

    def data(params: Tree, batch: Any) -> Tensor:
        return 0.5 * (batch["x"] @ params["w"] - batch["y"]).pow(2).mean()

    def inner(params: Tree, hparams: Tree, batch: Any) -> Tensor:
        return data(params, batch) + 0.5 * (hparams["log_wd"].exp() * params["w"].pow(2)).sum()

    def outer(params: Tree, hparams: Tree, batch: Any) -> Tensor:
        return data(params, batch)

    def hessian(h: Tensor) -> Tensor:
        return x.T @ x / len(x) + torch.diag(h.exp())

    def minimize(hparams: Tree) -> Tree:
        h = hparams["log_wd"].detach()
        return {"w": torch.linalg.solve(hessian(h), x.T @ y / len(x)).requires_grad_()}

    def hypergradient(hparams: Tree) -> Tree:
        h, w = hparams["log_wd"].detach(), minimize(hparams)["w"].detach()
        q = torch.linalg.solve(hessian(h), xv.T @ (xv @ w - yv) / len(xv))
        return {"log_wd": -h.exp() * w * q}

    params, hparams = (
        {"w": 0.3 * _normal(4, 6, dtype=dtype)},
        {"log_wd": _normal(5, 6, dtype=dtype)},
    )
    return Case(
        Problem(inner, outer),
        trained(params),
        trained(hparams),
        {"x": x, "y": y},
        {"x": xv, "y": yv},
        minimize,
        hypergradient,
    )


def softmax_ridge(dtype: torch.dtype = torch.float64) -> Case:
    """Softmax regression W (features × classes) with one log weight decay per feature."""
    d, c, n = 5, 3, 24
    x, xv = _normal(0, n, d, dtype=dtype), _normal(2, n, d, dtype=dtype)
    teacher = _normal(6, d, c, dtype=dtype)
    y, yv = ((a @ teacher + _normal(s, n, c, dtype=dtype)).argmax(1) for a, s in ((x, 7), (xv, 8)))

    def inner(params: Tree, hparams: Tree, batch: Any) -> Tensor:
        decay = 0.5 * (hparams["log_wd"].exp()[:, None] * params["w"].pow(2)).sum()
        return F.cross_entropy(batch["x"] @ params["w"], batch["y"]) + decay

    def outer(params: Tree, hparams: Tree, batch: Any) -> Tensor:
        return F.cross_entropy(batch["x"] @ params["w"], batch["y"])

    def gradient(w: Tensor, a: Tensor, labels: Tensor) -> Tensor:
        return a.T @ (torch.softmax(a @ w, 1) - F.one_hot(labels, c).to(w)) / n

    def hessian(w: Tensor, h: Tensor) -> Tensor:
        """(1/n) Σᵢ xᵢxᵢᵀ ⊗ (diag pᵢ − pᵢpᵢᵀ) + diag(eʰ) ⊗ I, on row-major vec(W)."""
        p = torch.softmax(x @ w, 1)
        spread = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        curvature = torch.einsum("ia,ib,ikl->akbl", x, x, spread).reshape(d * c, d * c) / n
        return curvature + torch.diag(h.exp().repeat_interleave(c))

    def minimize(hparams: Tree) -> Tree:
        h, w = hparams["log_wd"].detach(), torch.zeros(d, c, dtype=dtype)
        for _ in range(30):
            g = gradient(w, x, y) + h.exp()[:, None] * w
            w = w - torch.linalg.solve(hessian(w, h), g.reshape(-1)).reshape(d, c)
        return {"w": w.requires_grad_()}

    def hypergradient(hparams: Tree) -> Tree:
        h, w = hparams["log_wd"].detach(), minimize(hparams)["w"].detach()
        q = torch.linalg.solve(hessian(w, h), gradient(w, xv, yv).reshape(-1)).reshape(d, c)
        return {"log_wd": -h.exp() * (w * q).sum(1)}

    return Case(
        Problem(inner, outer),
        trained({"w": 0.1 * _normal(4, d, c, dtype=dtype)}),
        trained({"log_wd": _normal(5, d, dtype=dtype) - 2}),
        {"x": x, "y": y},
        {"x": xv, "y": yv},
        minimize,
        hypergradient,
    )


def direct_outer(dtype: torch.dtype = torch.float64) -> Case:
    """Ten parameters, F with a strong direct term: f = wᵀAw/2 − h·w/100, F = ‖w − t‖²/2 + 10‖h‖².

    w* = A⁻¹h/100 and dF/dh = A⁻¹(w* − t)/100 + 20 h: without ∂F/∂h the answer is off by orders.
    """
    root, target = _normal(0, 10, 10, dtype=dtype), _normal(1, 10, dtype=dtype)
    a = root @ root.T / 10 + torch.eye(10, dtype=dtype)

    def flat(params: Tree) -> Tensor:
        return torch.cat([params["body"], params["head"][0]])

    def inner(params: Tree, hparams: Tree, batch: Any) -> Tensor:
        w = flat(params)
        return 0.5 * w @ a @ w - hparams["h"] @ w / 100

    def outer(params: Tree, hparams: Tree, batch: Any) -> Tensor:
        return 0.5 * (flat(params) - target).pow(2).sum() + 10 * hparams["h"].pow(2).sum()

    def minimize(hparams: Tree) -> Tree:
        w = torch.linalg.solve(a, hparams["h"].detach()) / 100
        return trained({"body": w[:7], "head": (w[7:],)})

    def hypergradient(hparams: Tree) -> Tree:
        h, w = hparams["h"].detach(), flat(minimize(hparams)).detach()
        return {"h": torch.linalg.solve(a, w - target) / 100 + 20 * h}

    start = {"body": torch.zeros(7, dtype=dtype), "head": (torch.ones(3, dtype=dtype),)}
    hparams = trained({"h": _normal(2, 10, dtype=dtype)})
    problem = Problem(inner, outer)
    return Case(problem, trained(start), hparams, None, None, minimize, hypergradient)


def mlp(dtype: torch.dtype = torch.float64) -> Case:
    """tanh network 4-5-3 with one log weight decay per parameter and one log weight per sample."""
    n = 16
    shapes = {"w1": (4, 5), "b1": (5,), "w2": (5, 3), "b2": (3,)}
    params = {k: 0.5 * _normal(i, *s, dtype=dtype) for i, (k, s) in enumerate(shapes.items())}
    log_wd = {
        k: 0.3 * _normal(i + 9, *s, dtype=dtype) - 2 for i, (k, s) in enumerate(shapes.items())
    }
    batches = [
        {
            "x": _normal(20 + s, n, 4, dtype=dtype),
            "y": torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(s)),
        }
        for s in range(2)
    ]

    def losses(params: Tree, batch: Any) -> Tensor:
        hidden = torch.tanh(batch["x"] @ params["w1"] + params["b1"])
        return F.cross_entropy(hidden @ params["w2"] + params["b2"], batch["y"], reduction="none")

    def inner(params: Tree, hparams: Tree, batch: Any) -> Tensor:
        decay = sum((h.exp() * params[k].pow(2)).sum() for k, h in hparams["log_wd"].items())
        return (torch.sigmoid(hparams["weight"]) * losses(params, batch)).mean() + decay

    def outer(params: Tree, hparams: Tree, batch: Any) -> Tensor:
        return losses(params, batch).mean()

    hparams = {"log_wd": log_wd, "weight": 0.5 * _normal(40, n, dtype=dtype)}
    return Case(Problem(inner, outer), trained(params), trained(hparams), *batches)


class Tied(nn.Module):
    """An autoencoder whose decoder weight is the encoder's, with a frozen scale."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.decoder.weight = self.encoder.weight
        self.scale = nn.Parameter(torch.full((6,), 1.5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.encoder(x)) * self.scale
        return torch.cat([self.decoder(hidden), hidden.mean(1, keepdim=True)], 1)


class Attention(nn.Module):
    """One transformer layer over three tokens of four features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            4, 2, dim_feedforward=6, dropout=0.0, activation="gelu", batch_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x[:, :, None].expand(-1, -1, 4) * x[:, None, :4])
        return out.mean(1)


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def _dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3))


def module(
    make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, seeded: bool = True
) -> Case:
    """A train-mode module with one log weight decay per parameter, through `module_problem`.

    With `seeded`, random draws come from ``batch["seed"]``, so that the losses are pure.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make().to(dtype).train()

    def data(net: nn.Module, batch: Any) -> Tensor:
        if not seeded:
            return F.cross_entropy(net(batch["x"]), batch["y"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch["seed"])
            return F.cross_entropy(net(batch["x"]), batch["y"])

    def inner(net: nn.Module, hparams: Tree, batch: Any) -> Tensor:
        decay = sum(
            (hparams[name].exp() * p.pow(2)).sum()
            for name, p in net.named_parameters()
            if name in hparams
        )
        return data(net, batch) + decay

    def outer(net: nn.Module, hparams: Tree, batch: Any) -> Tensor:
        return data(net, batch)

    problem, params = module_problem(net, inner, outer)
    hparams = {k: torch.full_like(p, -3.0) for k, p in params.items() if p.requires_grad}
    batches = [
        {
            "x": _normal(20 + s, 12, 6, dtype=dtype),
            "y": torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(s)),
            "seed": s,
        }
        for s in range(2)
    ]
    return Case(problem, params, trained(hparams), *batches)


def batch_norm(dtype: torch.dtype = torch.float64) -> Case:
    return module(_batch_norm, dtype)


def dropout(dtype: torch.dtype = torch.float64) -> Case:
    return module(_dropout, dtype)


def tied_and_frozen(dtype: torch.dtype = torch.float64) -> Case:
    return module(Tied, dtype)


def attention(dtype: torch.dtype = torch.float64) -> Case:
    return module(Attention, dtype)


SOLVED: dict[str, Callable[..., Case]] = {
    "ridge": ridge,
    "softmax_ridge": softmax_ridge,
    "direct_outer": direct_outer,
}
CASES: dict[str, Callable[..., Case]] = {
    **SOLVED,
    "mlp": mlp,
    "batch_norm": batch_norm,
    "dropout": dropout,
    "tied_and_frozen": tied_and_frozen,
    "attention": attention,
}
