"""Optimal transport between clouds of points: matching images of digits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.tasks.bundled import load_digit_images
from adapters.tasks.task import Task
from bilevel.checks import integer

__all__ = ["Transport", "digit_clouds"]


@dataclass(frozen=True, eq=False)
class Transport(Task):
    """Problems min_T ⟨T, C⟩ over plans between two weighted clouds, one problem a row.

    "x" are source points, shape (problems, m, d), "y" target points, shape (problems, n, d); "a"
    and "b" are their weights, shapes (problems, m) and (problems, n), of equal mass.  C_ij is the
    squared distance of points i and j over the largest one of the problem.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, split in self.splits.items():
            for weights, points in (("a", "x"), ("b", "y")):
                if weights not in split or split[weights].shape != split[points].shape[:2]:
                    found = tuple(split[weights].shape) if weights in split else None
                    raise ValueError(
                        f"splits[{name!r}][{weights!r}] must hold the weights of {points!r}, shape "
                        f"{tuple(split[points].shape[:2])}, but got {found}."
                    )
                if not bool((split[weights] > 0).all()):
                    raise ValueError(f"splits[{name!r}][{weights!r}] must be positive.")
            masses = split["a"].sum(dim=1), split["b"].sum(dim=1)
            if not torch.allclose(masses[0], masses[1]):
                raise ValueError(
                    f"splits[{name!r}]: a and b must have equal mass, but got {masses[0].tolist()} "
                    f"and {masses[1].tolist()}."
                )

    def cost(self, batch: Mapping[str, Any]) -> Tensor:
        """Return C of each problem, shape (problems, m, n)."""
        squared = torch.cdist(batch["x"], batch["y"]).square()
        return squared / squared.amax(dim=(1, 2), keepdim=True)

    def measure(self, outputs: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return "loss" ⟨T, C⟩, and how far T misses its marginals, of each problem.

        A plan that misses its marginals can be cheaper than any that does not: "row_error" and
        "column_error" (sums of absolute differences) belong beside the loss.

        Args:
            outputs: plans T, shape (problems, m, n).
            batch: the problems.
        """
        return {
            "loss": (outputs * self.cost(batch)).sum(dim=(1, 2)),
            "row_error": (outputs.sum(dim=2) - batch["a"]).abs().sum(dim=1),
            "column_error": (outputs.sum(dim=1) - batch["b"]).abs().sum(dim=1),
        }


def digit_clouds(m: int = 30, n: int = 40, problems: int = 1, seed: int = 0) -> Transport:
    """Matching of zeros to eights among handwritten digits, as points of 64 pixels.

    Args:
        m: zeros of a problem.
        n: eights of a problem.
        problems: problems of each split; no image appears twice.
        seed: decides which images.

    Raises:
        TypeError: an argument that is not an integer.
        ValueError: a size that is not positive, or more images than there are.
    """
    images, labels = load_digit_images()
    generator = np.random.default_rng(integer("seed", seed, minimum=0))
    sizes = {"m": integer("m", m, minimum=1), "n": integer("n", n, minimum=1)}
    problems = integer("problems", problems, minimum=1)
    clouds = []
    for size, digit in zip(sizes.values(), (0, 8), strict=True):
        rows = np.flatnonzero(labels == digit)
        if 3 * problems * size > len(rows):
            raise ValueError(
                f"3 splits of {problems} problems need {3 * problems * size} images of {digit}, "
                f"but there are {len(rows)}."
            )
        chosen = generator.permutation(rows)[: 3 * problems * size]
        points = torch.from_numpy(images[chosen].reshape(3, problems, size, 64))
        clouds.append(points)
    splits = {
        name: {
            "x": clouds[0][i],
            "y": clouds[1][i],
            "a": torch.full((problems, m), 1 / m, dtype=torch.float64),
            "b": torch.full((problems, n), 1 / n, dtype=torch.float64),
        }
        for i, name in enumerate(("train", "val", "test"))
    }
    options = {**sizes, "problems": problems, "seed": seed}
    return Transport("digit_clouds", splits, options)
