"""APG: guidance of a diffusion sampler, projected, capped, and with negative momentum.

With denoised predictions D_c = D(z, y) and D_u = D(z, ∅) at a step of the sampler:

    m ← (D_c − D_u) + β m,    Δ = m · min(1, r/‖m‖),    Δ∥ = ⟨Δ, D_c⟩/⟨D_c, D_c⟩ D_c,  Δ⊥ = Δ − Δ∥
    D_APG = D_c + (w − 1)(Δ⊥ + η Δ∥)

m = 0 at the first step of a trajectory; norms and products are those of one sample.  η = 1, r = ∞
and β = 0 is classifier-free guidance D_u + w (D_c − D_u); w = 1 is D_c.  Nothing is trained: the
denoiser is frozen, a step draws one batch of samples.

Samples are differentiable in w, η and β through the unrolled sampler, and almost everywhere in r
(exactly zero while the cap is inactive); see `sample`.

Differs on purpose from a widely used port, which starts from D_u instead of D_c (a shifted scale)
and applies the projection to raw model outputs instead of denoised predictions.

Source: Sadat, Hilliges and Weber, "Eliminating Oversaturation and Artifacts of High Guidance
Scales in Diffusion Models", ICLR 2025, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from adapters.generation.denoiser import Denoiser, scaled
from adapters.iteration import Iteration, Progress
from adapters.networks import MLP
from adapters.tasks import Classification, Task
from bilevel.domains import Choice, Float, Grad, Int
from bilevel.metrics import Role, RunStatus
from bilevel.space import Space

__all__ = ["APG", "frechet_distance", "guided", "sample"]

SIGMA_MAX, SIGMA_MIN, RHO = 20.0, 0.02, 7.0

Number = float | Tensor


class APG(Iteration):
    """Adaptive projected guidance: samples of a conditional denoiser at a high guidance scale."""

    name = "apg"
    space = Space(
        scale=Grad(4.0, low=1.0, high=20.0, doc="w, guidance scale; smooth"),
        parallel=Grad(1.0, low=0.0, high=1.5, doc="η, weight of the parallel part; smooth"),
        capped=Choice(True, False, default=True, doc="whether the norm of the guidance has a cap"),
        cap=Grad(
            2.0,
            low=0.1,
            high=60.0,
            scale="log",
            when={"capped": True},
            doc="r; smooth a.e., no effect above the largest norm",
        ),
        momentum=Grad(-0.5, low=-0.95, high=0.0, doc="β, negative repels; smooth"),
        first=Float(0.0, 0.5, default=0.0, doc="share of the steps before guidance starts"),
        last=Float(0.5, 1.0, default=1.0, doc="share of the steps after which it ends"),
        steps=Int(5, 100, log=True, default=20, doc="Euler steps of a trajectory"),
        batch=Int(10, 1000, log=True, default=100, doc="samples drawn in a step"),
    ).own(scale="sampler", parallel="sampler", cap="sampler", momentum="sampler")
    needs = ("denoiser", "judge")
    task_type: ClassVar[type[Task]] = Classification
    roles: ClassVar[Mapping[str, Role]] = {
        "accuracy": "constraint",
        "overshoot": "diagnostic",
        "deviation": "diagnostic",
    }

    def start(self) -> dict[str, Any]:
        """No samples yet."""
        features = self._features(self.setting.task.split("train")["x"])
        zero = torch.zeros_like(features[0], dtype=torch.float64)
        generator = torch.Generator().manual_seed(self.setting.seed)
        return {
            "generator": generator.get_state(),
            "count": 0,
            "sum": zero,
            "products": torch.outer(zero, zero),
            "hits": 0.0,
            "overshoot": 0.0,
            "deviation": 0.0,
        }

    def iterate(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], Progress]:
        """Draw a batch of samples of all classes in turn; add their features to the moments."""
        values, task = self.setting.constants, cast(Classification, self.setting.task)
        generator = torch.Generator()
        generator.set_state(state["generator"])
        labels = (torch.arange(values["batch"]) + state["count"]) % task.n_classes
        labels = labels.to(task.device)
        pixels = scaled(task.split("train")["x"][:1]).shape[1]
        noise = torch.randn(values["batch"], pixels, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            drawn = sample(
                cast(Denoiser, self.setting.artifacts["denoiser"]),
                noise.to(task.device, task.dtype),
                labels,
                values,
            )
            features = self._hidden(drawn).double()
            predicted = cast(MLP, self.setting.artifacts["judge"])(drawn).argmax(dim=1)
        after = {
            "generator": generator.get_state(),
            "count": state["count"] + len(drawn),
            "sum": state["sum"] + features.sum(dim=0),
            "products": state["products"] + features.T @ features,
            "hits": state["hits"] + float((predicted == labels).double().sum()),
            "overshoot": state["overshoot"] + float((drawn.abs() - 1).clamp(min=0).mean(1).sum()),
            "deviation": state["deviation"] + float(drawn.std(dim=1).sum()),
        }
        if not bool(drawn.isfinite().all()):
            return after, Progress({"loss": math.nan}, RunStatus.DIVERGED, gradients=0)
        return after, Progress(self.measure(after, "val"), RunStatus.RUNNING, gradients=0)

    def measure(self, state: Mapping[str, Any], split: str) -> Mapping[str, float]:
        """Fréchet distance to a split in the judge's features, and what samples look like.

        "loss" is the distance; before the first sample it is that of the point at the origin.
        "accuracy" is the share of samples that the judge takes for their class, "overshoot" the
        mean of how far pixels leave [−1, 1], "deviation" the mean standard deviation of the
        pixels of a sample.
        """
        count = max(state["count"], 1)
        real = self._features(self.setting.task.split(split)["x"]).double()
        mean = state["sum"] / count
        covariance = state["products"] / count - torch.outer(mean, mean)
        distance = frechet_distance(
            mean, covariance, real.mean(dim=0), torch.cov(real.T, correction=0)
        )
        return {
            "loss": distance,
            "accuracy": state["hits"] / count,
            "overshoot": state["overshoot"] / count,
            "deviation": state["deviation"] / count,
        }

    def _features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self._hidden(scaled(images))

    def _hidden(self, x: Tensor) -> Tensor:
        """Return the last hidden layer of the judge."""
        kept: list[Tensor] = []
        judge = cast(MLP, self.setting.artifacts["judge"])
        last = len(judge.layers) - 1

        def keep(i: int, h: Tensor) -> Tensor:
            if i == last:
                kept.append(h)
            return h

        judge(x, keep)
        return kept[0]


def guided(
    conditional: Tensor,
    unconditional: Tensor,
    momentum: Tensor,
    *,
    scale: Number,
    parallel: Number,
    cap: Number | None,
    beta: Number,
) -> tuple[Tensor, Tensor]:
    """Return D_APG and the next momentum m; differentiable in every number.

    Args:
        conditional: D_c, a denoised prediction, shape (batch, ...).
        unconditional: D_u.
        momentum: m of the step before; zeros at the first step.
        scale: w ≥ 1.
        parallel: η.
        cap: r > 0; None is no cap.
        beta: β; |β| < 1 keeps m bounded.
    """
    momentum = conditional - unconditional + beta * momentum
    flat, base = momentum.flatten(1), conditional.flatten(1)
    if cap is not None:
        norm = flat.square().sum(dim=1, keepdim=True).clamp(min=1e-30).sqrt()
        flat = flat * torch.clamp(cap / norm, max=1.0)
    # The published algorithm projects in double precision.
    d, c = flat.double(), base.double()
    share = (d * c).sum(dim=1, keepdim=True) / c.square().sum(dim=1, keepdim=True).clamp(min=1e-30)
    along = (share * c).to(flat)
    update = (flat - along + parallel * along).reshape(conditional.shape)
    return conditional + (scale - 1) * update, momentum


def sample(
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    labels: Tensor,
    hparams: Mapping[str, Any],
) -> Tensor:
    """Return samples by Euler steps dz/dσ = (z − D_APG)/σ over σ of Karras et al. (ρ = 7).

    Differentiable in the guidance's numbers and in the noise.

    Args:
        denoise: ``(z, σ, labels) -> D``, where the label one above the largest stands for ∅; a
            `Denoiser`.
        noise: standard normal, shape (batch, features).
        labels: classes, shape (batch,).
        hparams: values for the names of `APG.space`, numbers or tensors.
    """
    steps = int(hparams["steps"])
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    ends = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    sigmas = [*((ends[0] + ramp * (ends[1] - ends[0])) ** RHO).tolist(), 0.0]
    nobody = torch.full_like(labels, cast(Denoiser, denoise).n_classes)
    z: Tensor = sigmas[0] * noise
    momentum = torch.zeros_like(noise)
    for i in range(steps):
        level = torch.full((len(z), 1), sigmas[i], dtype=z.dtype, device=z.device)
        denoised = denoise(z, level, labels)
        if hparams["first"] <= i / steps < hparams["last"]:
            denoised, momentum = guided(
                denoised,
                denoise(z, level, nobody),
                momentum,
                scale=hparams["scale"],
                parallel=hparams["parallel"],
                cap=hparams["cap"] if hparams["capped"] else None,
                beta=hparams["momentum"],
            )
        z = z + (sigmas[i + 1] - sigmas[i]) * (z - denoised) / sigmas[i]
    return z


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Return ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½), the distance of two Gaussians.

    Args:
        mean1: μ₁, shape (d,).
        cov1: Σ₁, shape (d, d), symmetric and not negative.
        mean2: μ₂.
        cov2: Σ₂.
    """
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    inner = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0)
    gap = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()
    return float(gap - 2 * inner.sqrt().sum())
