"""What an inexact solution says about the exact one: every inequality of MAID in one place.

With x̃ within ε of x̂(θ), ‖H(x̃) q - ∇g(x̃)‖ ≤ δ, z = ∂g/∂θ - J(x̃)ᵀ q and G = ‖∇ₓg(x̃)‖:

    ‖z - ∇f(θ)‖ ≤ ω = c ε + (‖J‖/μ) δ + (L_J L_g/μ) ε² + L_direct ε,            (2.1)
        c = L_g ‖J‖/μ + L_Hinv G ‖J‖ + L_J G/μ
    ω ≤ (1 - η) ‖z‖  makes -z a descent direction of f                          (2.2)
    g - G ε - ½ L_g ε² ≤ f(θ) ≤ g + G ε + ½ L_g ε²                              (2.3)

where the left ½ L_g ε² can be left out if g is convex.  Means over samples have mean bounds.

Source: Salehi, Mukherjee, Roberts and Ehrhardt 2025, theorem 2.1, lemma 3.5, remark 3.6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.inexact.constants import Constants

__all__ = ["hypergradient_bound", "rounding", "value_bounds"]


def hypergradient_bound(
    constants: Constants, eps: Tensor, delta: Tensor, outer_norm: Tensor
) -> float:
    """Return ω of (2.1), the mean over samples.

    Args:
        constants: at x̃.
        eps: distance of each sample's x̃ from its x̂, shape (m,).
        delta: residual of each adjoint system.
        outer_norm: G of each sample.
    """
    c = constants
    slope = (
        c.L_g * c.jacobian / c.mu
        + c.L_Hinv * outer_norm * c.jacobian
        + c.L_J * outer_norm / c.mu
        + c.L_direct
    )
    omega = slope * eps + c.jacobian / c.mu * delta + c.L_J * c.L_g / c.mu * eps.square()
    return float(omega.mean())


def value_bounds(
    constants: Constants, eps: Tensor, values: Tensor, outer_norm: Tensor
) -> tuple[float, float]:
    """Return the lower and the upper bound of (2.3) on f(θ), means over samples.

    Wider by the rounding of g, so that a decrease that rounding could have made is none.
    """
    curve = 0.5 * constants.L_g * eps.square()
    below = outer_norm * eps if constants.g_convex else outer_norm * eps + curve
    slack = rounding(values)
    lower, upper = values - below, values + outer_norm * eps + curve
    return float(lower.mean()) - slack, float(upper.mean()) + slack


def rounding(values: Tensor) -> float:
    """Return what rounding may have changed in the mean of g."""
    return float(8 * torch.finfo(values.dtype).eps * values.abs().mean())
