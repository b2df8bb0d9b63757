"""Denoising by smoothed total variation, its weight and smoothing learned from clean images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bilevel.domains import Grad
from bilevel.inexact.constants import Smoothness
from bilevel.inexact.samples import SmoothInner, sample_problem
from bilevel.space import Space

__all__ = ["CURVATURE", "check_images", "distortion", "psnr", "tv_denoising"]

CURVATURE = 48 / (25 * math.sqrt(5))
"""Largest |φ'''| of φ(s) = √(s² + 1): 3|s|/(s² + 1)^{5/2} at s = ½, 0.859."""

Images = dict[str, Tensor]
"""``{"clean": (m, H, W), "noisy": (m, H, W)}``."""


def check_images(images: Images, name: str) -> None:
    """Check a pair of stacks of images.

    Raises:
        TypeError: they are no floating tensors.
        ValueError: other keys, or shapes that are not (m, H, W).
    """
    if set(images) != {"clean", "noisy"}:
        raise ValueError(
            f"{name} must have the keys 'clean' and 'noisy', but has {sorted(images)}."
        )
    for key, stack in images.items():
        if not stack.is_floating_point():
            raise TypeError(f"{name}[{key!r}] must be floating in [0, 1], but is {stack.dtype}.")
        if stack.dim() != 3 or stack.shape != images["clean"].shape:
            raise ValueError(
                f"{name}[{key!r}] must have shape (m, H, W), that of 'clean', but got "
                f"{tuple(stack.shape)}."
            )


def distortion(params: Any, hparams: Any, images: Images) -> Tensor:
    """½‖xᵢ - clean‖² of each image: the outer loss of denoising, L_g = 1."""
    x: Tensor = params["x"]
    return 0.5 * (x - images["clean"]).square().sum((1, 2))


def psnr(x: Tensor, clean: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB for values in [0, 1], the mean over images."""
    error = (x.detach() - clean).square().mean((1, 2))
    return float((-10 * error.log10()).mean())


def tv_denoising(
    images: Images,
    *,
    init: tuple[float, float] = (-5.0, -5.0),
    low: tuple[float, float] | None = None,
    high: tuple[float, float] | None = None,
) -> SmoothInner:
    """Return denoising by anisotropic total variation, one inner problem for each image.

        h(x, θ) = ½‖x - noisy‖² + e^{θ₀} Σ √((Dx)² + e^{2θ₁}),    g(x) = ½‖x - clean‖²,

    D the differences to the right and lower neighbor.  Constants: μ = L_g = 1,
    L = 1 + 8 e^{θ₀-θ₁}, L_H = 8^{1.5} · 0.859 e^{θ₀-2θ₁}, L_J = 8√2 e^{θ₀-θ₁}; ‖J‖ is computed.

    Args:
        images: clean and noisy, values in [0, 1].
        init: initial θ, the logarithms of weight and smoothing.
        low: bounds on θ: κ explodes as θ₁ → -∞.
        high: see `low`.

    Raises:
        TypeError, ValueError: see `check_images`.
    """
    check_images(images, "images")

    def inner(params: Any, hparams: Mapping[str, Tensor], batch: Images) -> Tensor:
        x: Tensor = params["x"]
        weight = hparams["log_weight"].exp()
        floor = (2 * hparams["log_smoothing"]).exp()
        down, right = x.diff(dim=1), x.diff(dim=2)
        # The last row and column have the difference 0 to a neighbor that is not there; its
        # √(0 + floor) is a constant that no derivative in x sees, so it is left out.
        roughness = (down.square() + floor).sqrt().sum((1, 2))
        roughness = roughness + (right.square() + floor).sqrt().sum((1, 2))
        return 0.5 * (x - batch["noisy"]).square().sum((1, 2)) + weight * roughness

    def ratio(hparams: Mapping[str, Tensor], power: float) -> float:
        return math.exp(float(hparams["log_weight"]) - power * float(hparams["log_smoothing"]))

    smoothness = Smoothness(
        mu=1.0,
        L=lambda h, x: 1 + 8 * ratio(h, 1),
        L_g=1.0,
        L_J=lambda h, x: 8 * math.sqrt(2) * ratio(h, 1),
        L_H=lambda h, x: 8**1.5 * CURVATURE * ratio(h, 2),
        g_convex=True,
    )
    below, above = low or (None, None), high or (None, None)
    return SmoothInner(
        sample_problem(inner, distortion),
        {"x": images["noisy"].detach().clone().requires_grad_()},
        smoothness,
        space=Space(
            log_weight=Grad(init[0], low=below[0], high=above[0]),
            log_smoothing=Grad(init[1], low=below[1], high=above[1]),
        ),
        inner_batch=images,
        outer_batch=images,
    )
