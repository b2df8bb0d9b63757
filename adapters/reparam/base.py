"""A kind of weight map, and the module that holds its tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Fold", "Need", "Parts", "Reparam", "Start", "WeightMap", "wide"]

Need = Literal["inputs", "gradient"]

Fold = Literal["rows", "flat", "transposed"]
"""How a weight becomes a matrix (outputs, inputs): as it is; with all but the first dimension
flattened (convolutions); or transposed (Conv1D of transformers)."""


class Parts(NamedTuple):
    """The tensors of a weight map.

    Attributes:
        trained: θ by name.
        fixed: what is computed once from the weight or the data and stays.
    """

    trained: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Start:
    """What a weight map may start from.

    Attributes:
        name: of the module, for messages.
        weight: W₀ as a matrix, shape (outputs, inputs).
        inputs: rows of inputs that the layer got on calibration data, shape (rows, inputs);
            there for maps that need "inputs".
        gradient: ∂L/∂W₀ on calibration data; there for maps that need "gradient".
        generator: of random draws; None for torch's default.
    """

    name: str
    weight: Tensor
    inputs: Tensor | None = None
    gradient: Tensor | None = None
    generator: torch.Generator | None = None

    def check_rank(self, rank: int) -> int:
        """Return a rank that the weight has room for.

        Raises:
            ValueError: it is not in 1 ... min(outputs, inputs).
        """
        most = min(self.weight.shape)
        if not 1 <= rank <= most:
            raise ValueError(
                f"{self.name}: rank must lie in 1 ... {most} for a weight of shape "
                f"{tuple(self.weight.shape)}, but got {rank}."
            )
        return rank

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Draw Gaussian numbers like the weight."""
        w = self.weight
        drawn = torch.randn(shape, generator=self.generator, dtype=w.dtype)
        return (std * drawn).to(w.device)

    def uniform(self, *shape: int, bound: float) -> Tensor:
        """Draw uniform numbers in [−bound, bound) like the weight."""
        w = self.weight
        drawn = torch.rand(shape, generator=self.generator, dtype=w.dtype)
        return ((2 * drawn - 1) * bound).to(w.device)

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros like the weight."""
        return self.weight.new_zeros(shape)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U, σ and Vᵀ of the weight, with the largest entry of each row of Vᵀ positive."""
        return signed_svd(self.weight)


class Reparam(ABC):
    """A kind of weight map g and its settings; subclasses are frozen dataclasses.

    A setting that `weight`, `penalty` or `detached` read may be a tensor: `configured` puts it
    there, so that the loss is differentiable in it.  Draws and decompositions that a smooth
    setting scales are kept as fixed tensors and scaled in `weight`, so that it is differentiable
    in the setting, too.

    """

    @property
    def needs(self) -> frozenset[Need]:
        """What `Start` must hold; nothing by default."""
        return frozenset()

    @abstractmethod
    def start(self, start: Start) -> Parts:
        """Return the tensors before training.

        Raises:
            ValueError: settings that do not fit the weight.
        """

    @abstractmethod
    def weight(self, w: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Return g(W₀, θ), shape (outputs, inputs); differentiable in θ."""

    def penalty(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        """Return a regularizer of θ; none by default."""
        return None


class WeightMap(nn.Module):
    """The parametrization W = W₀ + gate · (g(W₀, θ) − W₀) of one weight.

    Attributes:
        reparam: g and its settings.
        fold: how the weight becomes a matrix.
        gate: 1 for g itself, 0 for the pretrained weight; a number or a tensor.
    """

    def __init__(self, reparam: Reparam, fold: Fold, parts: Parts) -> None:
        super().__init__()
        self.reparam = reparam
        self.fold: Fold = fold
        self.gate: float | Tensor = 1.0
        for name, value in parts.trained.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))
        for name, value in parts.fixed.items():
            self.register_buffer(name, value.detach().clone())

    @property
    def parts(self) -> dict[str, Tensor]:
        """The current tensors by name."""
        named: dict[str, Any] = {**self._parameters, **self._buffers}
        return named

    def forward(self, weight: Tensor) -> Tensor:
        """Return W in the shape of W₀."""
        w = as_matrix(weight, self.fold)
        new = self.reparam.weight(w, self.parts)
        if not (isinstance(self.gate, float) and self.gate == 1.0):
            new = w + self.gate * (new - w)
        return (new.T if self.fold == "transposed" else new).reshape(weight.shape)

    def penalty(self) -> Tensor | None:
        """The regularizer of this weight's θ."""
        return self.reparam.penalty(self.parts)


def as_matrix(weight: Tensor, fold: Fold) -> Tensor:
    """Return a weight as a matrix (outputs, inputs)."""
    if fold == "flat":
        return weight.flatten(1)
    return weight.T if fold == "transposed" else weight


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 where it has less: decompositions need it."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def signed_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD with signs fixed: the largest entry of each row of Vᵀ is positive.

    Computed in at least float32, returned in the type of the matrix.
    """
    u, sigma, vt = torch.linalg.svd(wide(matrix), full_matrices=False)
    largest = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(vt)
    return (u * signs.T).to(matrix), sigma.to(matrix), (vt * signs).to(matrix)
