"""Denoising by a field of experts: learned filters, their weights and smoothings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from bilevel.domains import Grad
from bilevel.inexact.constants import Smoothness
from bilevel.inexact.problems.variation import CURVATURE, Images, check_images, distortion
from bilevel.inexact.samples import SmoothInner, sample_problem
from bilevel.space import Space

__all__ = ["dct_filters", "field_of_experts"]


def dct_filters(size: int = 7) -> Tensor:
    """Return the size² - 1 non-constant filters of the 2-D discrete cosine basis, orthonormal."""
    i = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (i + 0.5) * i[:, None])
    basis = basis / basis.norm(dim=1, keepdim=True)
    filters = torch.einsum("ai,bj->abij", basis, basis).reshape(-1, size, size)
    return filters[1:]


def field_of_experts(
    images: Images,
    filters: Tensor | None = None,
    *,
    init: tuple[float, float, float] = (-3.0, -3.0, -3.0),
    learn_filters: bool = True,
    low: float | None = None,
    high: float | None = None,
) -> SmoothInner:
    """Return denoising by k filters, one inner problem for each image.

        h(x, θ) = ½‖x - noisy‖² + e^{s} Σⱼ e^{aⱼ} Σ_p √((cⱼ * x)²_p + e^{2νⱼ}),
        g(x)    = ½‖x - clean‖²,

    with hyperparameters "scale" s (), "weights" a (k,), "smoothings" ν (k,) and "filters" c
    (k, f, f): d = 1 + 2k + k f², 2,449 for the 48 DCT filters of size 7.  Convolutions are over
    whole patches, without padding, so that nothing is assumed about pixels outside the image.

    Constants with wⱼ = e^{s+aⱼ} and |ĉⱼ(ω)| the filter's transfer function on the image grid,
    whose periodic convolution contains the rows of this one:  μ = L_g = 1,
    L = 1 + max_ω Σ wⱼ e^{-νⱼ} |ĉⱼ|²,  L_H = 0.859 max_ω Σ wⱼ e^{-2νⱼ} ‖cⱼ‖ |ĉⱼ|²,  and with fixed
    filters L_J² = (max_ω Σ tⱼ)² + 2 Σ (max_ω tⱼ)², tⱼ = wⱼ e^{-νⱼ} |ĉⱼ|².  With learned ones J is
    not globally Lipschitz, since it grows with x, and L_J is estimated.

    Args:
        images: clean and noisy, values in [0, 1].
        filters: initial c (k, f, f); by default `dct_filters()`.
        init: initial s, a and ν.
        learn_filters: False keeps the filters as they are.
        low: bound on a and ν.
        high: bound on a and ν.

    Raises:
        TypeError, ValueError: see `check_images`.
        ValueError: filters that are larger than the images or not (k, f, f).
    """
    check_images(images, "images")
    grid = tuple(images["clean"].shape[1:])
    first = (dct_filters() if filters is None else filters.detach()).to(images["clean"].dtype)
    if first.dim() != 3 or any(f > n for f, n in zip(first.shape[1:], grid, strict=True)):
        raise ValueError(
            f"filters must have shape (k, f, f), no larger than the images {grid}, but got "
            f"{tuple(first.shape)}."
        )
    k = len(first)

    def kernels(hparams: Mapping[str, Tensor]) -> Tensor:
        return hparams["filters"] if learn_filters else first

    def inner(params: Any, hparams: Mapping[str, Tensor], batch: Images) -> Tensor:
        x: Tensor = params["x"]
        responses = F.conv2d(x[:, None], kernels(hparams)[:, None])
        floor = (2 * hparams["smoothings"]).exp()[:, None, None]
        experts = (responses.square() + floor).sqrt().sum((2, 3))
        prior = experts @ (hparams["scale"] + hparams["weights"]).exp()
        return 0.5 * (x - batch["noisy"]).square().sum((1, 2)) + prior

    def transfer(hparams: Mapping[str, Tensor], power: float) -> Tensor:
        """wⱼ e^{-power νⱼ} |ĉⱼ(ω)|², shape (k, H, W)."""
        c = kernels(hparams)
        scale = (hparams["scale"] + hparams["weights"] - power * hparams["smoothings"]).exp()
        response: Tensor = torch.fft.fft2(c, s=grid).abs()
        return scale[:, None, None] * response.square()

    def lipschitz(hparams: Mapping[str, Tensor], params: Any) -> float:
        return 1 + float(transfer(hparams, 1).sum(0).max())

    def hessian(hparams: Mapping[str, Tensor], params: Any) -> float:
        lengths = kernels(hparams).flatten(1).norm(dim=1)[:, None, None]
        return CURVATURE * float((lengths * transfer(hparams, 2)).sum(0).max())

    def cross(hparams: Mapping[str, Tensor], params: Any) -> float:
        # Each column of J, in s, aⱼ and νⱼ, is Lipschitz with the norm of wⱼ e^{-νⱼ} CⱼᵀCⱼ or their
        # sum; the norm of the matrix of differences is at most the root of the sum of squares.
        parts = transfer(hparams, 1)
        each = parts.flatten(1).max(1).values
        return math.sqrt(float(2 * each.square().sum() + parts.sum(0).max() ** 2))

    smoothness = Smoothness(
        mu=1.0,
        L=lipschitz,
        L_g=1.0,
        L_J=None if learn_filters else cross,
        L_H=hessian,
        g_convex=True,
    )
    domains = {
        "scale": Grad(init[0]),
        "weights": Grad(init[1], low=low, high=high, shape=(k,)),
        "smoothings": Grad(init[2], low=low, high=high, shape=(k,)),
    }
    if learn_filters:
        domains["filters"] = Grad(first.double(), shape=tuple(first.shape))
    return SmoothInner(
        sample_problem(inner, distortion),
        {"x": images["noisy"].detach().clone().requires_grad_()},
        smoothness,
        space=Space(domains),
        inner_batch=images,
        outer_batch=images,
    )
