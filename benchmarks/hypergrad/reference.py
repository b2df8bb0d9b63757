"""What is right: minima, and hypergradients in float64 by the plainest code, kept in a cache."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hypergrad import problems
from benchmarks.hypergrad.problems import Stationary, Training

__all__ = ["Reference", "reference", "relative_error"]

Reference = dict[str, Any]
"""`params`: where the module stands; `accepted`: one or two flat hypergradients that a right method
may return; `exact`: the flat one of the implicit function theorem, for a `Stationary`; `check`: the
largest relative difference to central differences, for a `Training`."""


def reference(name: str, steps: int | None, cache: Path) -> Reference:
    """Return the reference of a problem, computed once for each version of these two files."""
    digest = hashlib.sha256()
    for path in (Path(problems.__file__), Path(__file__)):
        digest.update(path.read_bytes())
    found = cache / f"{name}-{steps or 'all'}-{digest.hexdigest()[:12]}.pt"
    if not found.exists():
        problem = problems.make(name, torch.float64, steps)
        made = _stationary(problem) if isinstance(problem, Stationary) else _training(problem)
        cache.mkdir(parents=True, exist_ok=True)
        part = found.with_suffix(".part")
        torch.save(made, part)
        part.replace(found)
    loaded: Reference = torch.load(found, weights_only=True)
    return loaded


def relative_error(grads: Tensor, right: Tensor) -> float:
    """‖grads − right‖ / ‖right‖."""
    return float((grads.double() - right).norm() / right.norm())


# Unrolling: the textbook formulas with a graph through everything.


def _training(problem: Training) -> Reference:
    hparams = problem.leaves()
    value = unroll(problem, hparams)
    grads = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(hparams.values()))])
    return {
        "params": problem.module.state_dict(),
        "accepted": [grads],
        "check": _central_differences(problem, grads),
    }


def unroll(problem: Training, hparams: dict[str, Tensor]) -> Tensor:
    """Return F after all steps, differentiable in hparams."""
    rule, params = problem.rule, problem.params()
    buffers: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    tuned = any(h.requires_grad for h in hparams.values())
    for t, batch in enumerate(problem.batches, 1):
        loss = problem.inner_loss(problem.forward(params), params, hparams, batch)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=tuned)
        for (k, p), g in zip(list(params.items()), grads, strict=True):
            if rule.kind == "sgd":
                buffers[k] = rule.momentum * buffers[k] + g if k in buffers else g
                params[k] = p - rule.lr * buffers[k]
                continue
            buffers[k] = 0.9 * buffers.get(k, torch.zeros_like(p)) + 0.1 * g
            squares[k] = 0.999 * squares.get(k, torch.zeros_like(p)) + 0.001 * g * g
            mean, square = buffers[k] / (1 - 0.9**t), squares[k] / (1 - 0.999**t)
            # √ has no derivative at 0, where the entry has had no gradient: defined as 0.
            root = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
            params[k] = p - rule.lr * mean / (root + 1e-8)
    value = problem.outer_loss(problem.forward(params))
    return value if tuned else value.detach()


def _central_differences(problem: Training, grads: Tensor) -> float:
    """Return the largest relative error of grads along some random directions.

    Of two lengths the better: long differences meet the curvature of Adam, short ones rounding.
    """
    generator = torch.Generator().manual_seed(3)
    norm, worst = flat(problem.hparams.values()).norm(), 0.0
    for _ in range(3):
        # Along the gradient and a random part, so that the derivative is not small by chance.
        random = torch.randn(len(grads), generator=generator, dtype=torch.float64)
        direction = grads / grads.norm() + random / random.norm()
        errors = [
            abs(_difference(problem, direction, size * float(norm)) / float(grads @ direction) - 1)
            for size in (1e-3, 1e-6)
        ]
        worst = max(worst, min(errors))
    return worst


def _difference(problem: Training, direction: Tensor, size: float) -> float:
    ends = []
    for sign in (1, -1):
        rest, moved = sign * size * direction, {}
        for k, h in problem.hparams.items():
            moved[k], rest = h + rest[: h.numel()].view_as(h), rest[h.numel() :]
        ends.append(float(unroll(problem, moved)))
    return (ends[0] - ends[1]) / (2 * size)


# Implicit: the dense Hessian at the minimum.


def _stationary(problem: Stationary) -> Reference:
    minimize(problem)
    hparams, params = problem.leaves(), problem.params()
    weights = list(params.values())
    loss = problem.inner_loss(problem.forward(params), params, hparams, problem.batch)
    gradient = flat(torch.autograd.grad(loss, weights, create_graph=True))
    value = problem.outer_loss(problem.forward(params))
    b = flat(torch.autograd.grad(value, weights))
    basis = torch.eye(len(b), dtype=b.dtype)
    rows = [flat(torch.autograd.grad(gradient, weights, e, retain_graph=True)) for e in basis]
    hessian = torch.stack(rows)
    hessian = (hessian + hessian.T) / 2

    def hypergradient(v: Tensor) -> Tensor:
        found = torch.autograd.grad(gradient, list(hparams.values()), v, retain_graph=True)
        return -flat(found)

    iterates = conjugate_gradients(hessian, b, problem.iterations)
    least = min(iterates, key=lambda x: float((b - hessian @ x).norm()))
    return {
        "params": problem.module.state_dict(),
        # A solver may return its last iterate or the one with the least residual.
        "accepted": [hypergradient(iterates[-1]), hypergradient(least)],
        "exact": hypergradient(torch.linalg.solve(hessian, b)),
        "spectrum": torch.linalg.eigvalsh(hessian)[[0, -1]],
    }


def flat(tensors: Any) -> Tensor:
    """Concatenate."""
    return torch.cat([t.flatten() for t in tensors])


def conjugate_gradients(a: Tensor, b: Tensor, iterations: int) -> list[Tensor]:
    """Return the iterates 1 … K from x = 0; the last one again where the residual is rounding."""
    x, r = torch.zeros_like(b), b
    p, iterates = r, []
    for _ in range(iterations):
        if float(r.norm()) > 1e-14 * float(b.norm()):
            ap = a @ p
            alpha = (r @ r) / (p @ ap)
            x, after = x + alpha * p, r - alpha * ap
            p, r = after + (after @ after) / (r @ r) * p, after
        iterates.append(x)
    return iterates


def minimize(problem: Stationary, tolerance: float = 1e-6) -> None:
    """Move the module to a minimum of the inner loss.

    Raises:
        RuntimeError: no entry of the gradient may stay above the tolerance.
    """
    named = dict(problem.module.named_parameters())
    optimizer = torch.optim.LBFGS(
        named.values(),
        max_iter=200,
        history_size=50,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    largest = math.inf

    def closure() -> float:
        nonlocal largest
        optimizer.zero_grad()
        loss = problem.inner_loss(problem.module, named, problem.hparams, problem.batch)
        loss.backward()
        largest = max(float(p.grad.abs().max()) for p in named.values() if p.grad is not None)
        return loss.item()

    for _ in range(60):
        optimizer.step(closure)
        if largest <= tolerance:
            problem.module.zero_grad()
            return
    raise RuntimeError(f"{problem.name}: the largest gradient entry is still {largest:.1e}.")
