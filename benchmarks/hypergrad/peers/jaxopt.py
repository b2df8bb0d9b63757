"""JAXopt 0.8.5 on JAX 0.10.2, the yardstick outside of PyTorch; unrolling is a scan by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.hypergrad.library import Library, Method
from benchmarks.hypergrad.problems import RIDGE_P1, RIDGE_P3, Stationary, Training

__all__ = ["LIBRARY"]


def _methods(problem: Training | Stationary) -> list[Method]:
    @cache
    def built() -> tuple[Callable[[Any], Any], Any]:
        # At the first call only: JAX's threads do not survive the fork that measures memory.
        import jax

        jax.config.update("jax_enable_x64", True)
        hparams = {k: _array(v) for k, v in problem.hparams.items()}
        gradient = _implicit(problem) if isinstance(problem, Stationary) else _unrolled(problem)
        return jax.jit(gradient), hparams

    def run() -> Sequence[Tensor]:
        function, hparams = built()
        found = function(hparams)
        return [torch.from_numpy(np.array(found[k])) for k in problem.hparams]

    stationary = isinstance(problem, Stationary)
    name = "custom_root, solve_cg, jit" if stationary else "unrolled by scan, jit"
    return [Method(name, run, compiles=True)]


def _array(tensor: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(tensor.detach().numpy())


def _parameters(problem: Training | Stationary) -> dict[str, Any]:
    return {k: _array(p) for k, p in problem.module.named_parameters()}


def _forward(module: nn.Module) -> Callable[[Any, Any], Any]:
    """Return ``(parameters, x) -> outputs`` for the sequential modules of the problems."""
    import jax
    import jax.numpy as jnp

    assert isinstance(module, nn.Sequential)
    layers = list(module.named_children())

    def forward(w: Any, x: Any) -> Any:
        for name, layer in layers:
            if isinstance(layer, nn.Linear):
                x = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
            elif isinstance(layer, nn.Conv2d):
                kernel, bias = w[f"{name}.weight"], w[f"{name}.bias"]
                x = jax.lax.conv(x, kernel, (1, 1), "SAME") + bias[:, None, None]
            elif isinstance(layer, nn.Tanh):
                x = jnp.tanh(x)
            elif isinstance(layer, nn.AvgPool2d):
                b, c, h, v = x.shape
                x = x.reshape(b, c, h // 2, 2, v // 2, 2).mean((3, 5))
            elif isinstance(layer, nn.Unflatten):
                x = x.reshape(len(x), *layer.unflattened_size)
            elif isinstance(layer, nn.Flatten):
                x = x.reshape(-1) if layer.start_dim == 0 else x.reshape(len(x), -1)
            else:
                raise TypeError(f"No JAX version of {type(layer).__name__}.")
        return x

    return forward


def _cross_entropy(z: Any, y: Any) -> Any:
    """Each row's cross entropy; logistic for one output a row."""
    import jax
    import jax.numpy as jnp

    if z.ndim == 1:
        return jnp.logaddexp(0.0, z) - y * z
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1)[:, 0]


def _implicit(problem: Stationary) -> Callable[[Any], Any]:
    import jax
    import jaxopt

    forward, start = _forward(problem.module), _parameters(problem)
    x, y, x_val, y_val = (_array(t) for t in (*problem.batch, *problem.outer_batch))

    def inner(w: Any, h: Any) -> Any:
        losses = _cross_entropy(forward(w, x), y)
        if "weight" in h:
            ridge = sum((p * p).sum() for p in w.values())
            return (jax.nn.sigmoid(h["weight"]) * losses).mean() + 0.5 * RIDGE_P3 * ridge
        weight, bias = w["0.weight"], w["0.bias"]
        penalty = (jax.numpy.exp(h["log_penalty"]) * weight * weight).sum()
        return losses.mean() + 0.5 * (penalty + RIDGE_P1 * (bias * bias).sum())

    def solve(matvec: Any, b: Any) -> Any:
        return jaxopt.linear_solve.solve_cg(matvec, b, maxiter=problem.iterations, tol=0.0)

    @jaxopt.implicit_diff.custom_root(jax.grad(inner), solve=solve)  # type: ignore[untyped-decorator]
    def minimum(w: Any, h: Any) -> Any:
        return w

    def outer(h: Any) -> Any:
        return _cross_entropy(forward(minimum(start, h), x_val), y_val).mean()

    return jax.grad(outer)  # type: ignore[no-any-return]


def _unrolled(problem: Training) -> Callable[[Any], Any]:
    import jax
    import jax.numpy as jnp

    forward, start, rule = _forward(problem.module), _parameters(problem), problem.rule
    x = _array(torch.stack([b.x for b in problem.batches]))
    y = _array(torch.stack([b.y for b in problem.batches]))
    x_val, y_val = (_array(t) for t in problem.outer_batch)
    tree = jax.tree_util.tree_map

    def inner(w: Any, h: Any, x: Any, y: Any) -> Any:
        penalty = sum((h[k] * p * p).sum() for k, p in w.items())
        return _cross_entropy(forward(w, x), y).mean() + 0.5 * penalty

    def root(v: Any) -> Any:
        """√v with derivative 0 at 0."""
        return jnp.where(v > 0, jnp.sqrt(jnp.where(v > 0, v, 1.0)), 0.0)

    def step(h: Any, carry: Any, batch: Any) -> Any:
        w, m, v, t = carry
        g, t = jax.grad(inner)(w, h, *batch), t + 1
        if rule.kind == "sgd":
            m = tree(lambda m, g: rule.momentum * m + g, m, g)
            return (tree(lambda w, m: w - rule.lr * m, w, m), m, v, t), None
        m = tree(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = tree(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
        c1, c2 = 1 - 0.9**t, 1 - 0.999**t

        def move(w: Any, m: Any, v: Any) -> Any:
            denominator = root(v) / jnp.sqrt(c2).astype(w.dtype) + 1e-8
            return w - (rule.lr / c1).astype(w.dtype) * m / denominator

        return (tree(move, w, m, v), m, v, t), None

    def outer(h: Any) -> Any:
        zeros = tree(jnp.zeros_like, start)
        carry = (start, zeros, zeros, jnp.zeros((), jnp.float64))
        (w, *_), _ = jax.lax.scan(lambda c, b: step(h, c, b), carry, (x, y))
        return _cross_entropy(forward(w, x_val), y_val).mean()

    return jax.grad(outer)  # type: ignore[no-any-return]


LIBRARY = Library(
    "jaxopt",
    "JAXopt 0.8.5, JAX 0.10.2",
    ("jaxopt",),
    _methods,
    requirements=(
        "jax==0.10.2",
        "jaxlib==0.10.2",
        "jaxopt==0.8.5",
        "ml_dtypes==0.6.0",
        "opt_einsum==3.4.0",
    ),
)
