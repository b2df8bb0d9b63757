"""A small conditional denoiser of images, preconditioned as in EDM, and features to judge by."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters import artifacts
from adapters.networks import MLP
from adapters.tasks import Classification, Task
from hypergrad import seeded

__all__ = ["SIGMA_DATA", "Denoiser", "scaled"]

SIGMA_DATA = 0.75
"""Standard deviation of the data that the preconditioning assumes."""

STEPS, BATCH, DROPPED = 2000, 128, 0.15


class Denoiser(nn.Module):
    """D(z; σ, y): the expected clean image of class y given z = x + σ ε; y = K means any class.

        D = σ_d²/(σ² + σ_d²) z + σ σ_d/√(σ² + σ_d²) net(z/√(σ² + σ_d²), ln(σ)/4, y)

    Karras et al., NeurIPS 2022, equation 7.

    Args:
        features: pixels of an image.
        n_classes: K.
        width: hidden units of each of three layers.
    """

    def __init__(self, features: int, n_classes: int, width: int = 256) -> None:
        super().__init__()
        self.n_classes = n_classes
        self.classes = nn.Embedding(n_classes + 1, width)
        self.first = nn.Linear(features + 1, width)
        self.body = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.last = nn.Linear(width, features)

    def forward(self, z: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Return D, shape (batch, features).

        Args:
            z: noisy images, shape (batch, features).
            sigma: σ > 0, shape (batch, 1).
            labels: classes 0 ... K, shape (batch,).
        """
        total = (sigma.square() + SIGMA_DATA**2).sqrt()
        h = self.first(torch.cat([z / total, sigma.log() / 4], dim=1)) + self.classes(labels)
        out = self.last(self.body(h))
        denoised: Tensor = (SIGMA_DATA / total) ** 2 * z + sigma * SIGMA_DATA / total * out
        return denoised


def scaled(x: Tensor) -> Tensor:
    """Return images with values in [0, 1] as rows with values in [−1, 1], centered as APG needs."""
    return 2 * x.flatten(1) - 1


@artifacts.register("denoiser")
def denoiser(task: Task, seed: int) -> nn.Module:
    """A `Denoiser` of the training images, 15 % of the labels dropped: Adam, 2000 steps of 128."""
    data = _images(task)
    x, y = scaled(data.split("train")["x"]), data.split("train")["y"]
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        model = Denoiser(x.shape[1], data.n_classes).to(task.device, task.dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=generator).to(x.device)
        sigma = (1.2 * torch.randn(BATCH, 1, generator=generator, dtype=torch.float64) - 1.2).exp()
        noise = torch.randn(BATCH, x.shape[1], generator=generator, dtype=torch.float64)
        drop = torch.rand(BATCH, generator=generator) < DROPPED
        labels = torch.where(drop.to(x.device), data.n_classes, y[rows])
        sigma, noise = sigma.to(x), noise.to(x)
        weight = (sigma.square() + SIGMA_DATA**2) / (sigma * SIGMA_DATA).square()
        optimizer.zero_grad()
        with torch.enable_grad():
            error = model(x[rows] + sigma * noise, sigma, labels) - x[rows]
            torch.autograd.backward((weight * error.square()).mean())
        optimizer.step()
        annealing.step()
    optimizer.zero_grad()
    return model


@artifacts.register("judge")
def judge(task: Task, seed: int) -> nn.Module:
    """A classifier of the training images; its hidden units are features to compare samples by."""
    data = _images(task)
    x, y = scaled(data.split("train")["x"]), data.split("train")["y"]
    with seeded(seed):
        model = MLP((x.shape[1],), data.n_classes, width=(64, 16), activation="silu")
    model = model.to(task.device, task.dtype)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        rows = torch.randint(len(x), (64,), generator=generator).to(x.device)
        optimizer.zero_grad()
        with torch.enable_grad():
            torch.autograd.backward(F.cross_entropy(model(x[rows]), y[rows]))
        optimizer.step()
    optimizer.zero_grad()
    return model


def _images(task: Task) -> Classification:
    if not isinstance(task, Classification) or not task.is_image:
        raise ValueError(
            f"a denoiser needs images with classes, but {task.name!r} is a {type(task).__name__} "
            f"of shape {task.input_shape}."
        )
    return task
