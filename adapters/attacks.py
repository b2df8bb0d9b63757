"""Attacks on inputs: projected gradient ascent in a box (Madry et al., ICLR 2018)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.checks import integer, real

__all__ = ["pgd"]


def pgd(
    losses: Callable[[Tensor], Tensor],
    x: Tensor,
    epsilon: float,
    steps: int,
    *,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Return inputs in the ball ‖x' − x‖_∞ ≤ ε that raise each sample's loss.

        x' ← clamp(Π_ε(x' + a sign ∇ loss(x'))),   the best of all iterates of each sample

    Args:
        losses: ``x -> loss of each sample``; of log-probabilities as well as of logits.
        x: inputs, shape (batch, ...).
        epsilon: ε ≥ 0.
        steps: gradient steps.
        step_size: a; by default 2.5 ε / steps.
        generator: for a uniform random start in the ball; None starts at x.
        low: smallest value of an input.
        high: largest.

    Raises:
        TypeError, ValueError: ε negative or not finite, or steps not a positive integer.
    """
    epsilon, steps = real("epsilon", epsilon), integer("steps", steps, minimum=1)
    if epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, but got {epsilon}.")
    size = 2.5 * epsilon / steps if step_size is None else real("step_size", step_size)
    x = x.detach()
    moved = x
    if generator is not None:
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
        moved = (x + epsilon * (2 * noise - 1)).clamp(low, high)
    best, highest = x, torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    for step in range(steps + 1):
        moved = moved.detach().requires_grad_()
        with torch.enable_grad():
            each = losses(moved)
            (grad,) = torch.autograd.grad(each.sum(), moved)
        better = each.detach() > highest
        mask = better.reshape(-1, *[1] * (x.dim() - 1))
        best = torch.where(mask, moved.detach(), best)
        highest = torch.where(better, each.detach(), highest)
        if step < steps:
            ahead = moved.detach() + size * grad.sign()
            moved = torch.minimum(torch.maximum(ahead, x - epsilon), x + epsilon).clamp(low, high)
    return best
