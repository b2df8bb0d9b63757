"""Weight compander: every weight is a bounded function of a latent one.

    w = ψ(v; a, b) = a φ(v/b),   φ odd, increasing, bounded, φ'(0) = 1: arctan, softsign or tanh

|w| stays below a sup φ, and the slope at zero is γ = a/b: for γ > 1 small weights are expanded and
large ones compressed.  v is trained in place of w.  For arctan, SGD on v moves w by −η γ² cos⁴(w/a)
∂L/∂w to first order: weights near zero move faster, large ones freeze (derived).  Weight decay on v
is a penalty on w that is weaker by γ² near zero, and a barrier at the bound.

a and b can be fixed, trained on the training loss as published, or tuned on the validation loss by
hypergradients.  Nothing in the training loss rewards regularization, and learning them there undoes
it.  In front of BatchNorm a has no effect.

Source: Cakaj, Mehnert and Yang, Weight compander, arXiv 2306.16993.  The function and the treatment
of a and b are recalled and derived, not quoted: no official code is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "Compander",
    "LayerReport",
    "WeightCompander",
    "bake",
    "bound",
    "compand",
    "companders",
    "hyperparameters",
    "report",
]

Shape = Literal["arctan", "softsign", "tanh"]


class _Function(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    limit: float


_FUNCTIONS: dict[str, _Function] = {
    "arctan": _Function(torch.arctan, torch.tan, math.pi / 2),
    "softsign": _Function(nn.functional.softsign, lambda y: y / (1 - y.abs()), 1.0),
    "tanh": _Function(torch.tanh, torch.arctanh, 1.0),
}


@dataclass(frozen=True)
class WeightCompander:
    """Settings of a compander.

    Attributes:
        amplitude: a in units of the standard deviation of the layer's weights.
        gamma: γ = a/b, the slope at zero.
        shape: φ.
        start: "plain" takes the layer's weights as v; "matched" inverts them, so that w starts
            where it was, clipped at 98 % of the bound.
        learned: whether log a and log b are trained parameters, on the training loss.

    Raises:
        ValueError: a number that is not positive and finite, or an unknown name.
    """

    amplitude: float = 2.0
    gamma: float = 2.0
    shape: Shape = "arctan"
    start: Literal["plain", "matched"] = "plain"
    learned: bool = False

    def __post_init__(self) -> None:
        for name in ("amplitude", "gamma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, but got {getattr(self, name)}.")
        if self.shape not in _FUNCTIONS:
            raise ValueError(f"shape must be one of {list(_FUNCTIONS)}, but got {self.shape!r}.")
        if self.start not in ("plain", "matched"):
            raise ValueError(f"start must be 'plain' or 'matched', but got {self.start!r}.")


class Compander(nn.Module):
    """The parametrization w = a φ(v/b) of one weight.

    Attributes:
        settings: φ and the start.
        unit: standard deviation of the weight at the start.
        log_a: log a; a parameter where it is learned, else a buffer.
        log_b: log b.
        clipped: how many entries a matched start could not represent.
    """

    log_a: Tensor
    log_b: Tensor

    def __init__(self, settings: WeightCompander, weight: Tensor) -> None:
        super().__init__()
        self.settings, self.unit = settings, float(weight.detach().float().std(correction=0))
        if not self.unit > 0:
            raise ValueError("the weights have no spread, so there is no unit for the amplitude.")
        wide = torch.promote_types(weight.dtype, torch.float32)
        a = torch.tensor(settings.amplitude * self.unit, dtype=wide, device=weight.device)
        logs = {"log_a": a.log(), "log_b": (a / settings.gamma).log()}
        for name, value in logs.items():
            if settings.learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        self.clipped = 0
        self._override: tuple[Tensor | float, Tensor | float] | None = None

    @property
    def values(self) -> tuple[Tensor | float, Tensor | float]:
        """a and b now."""
        return self._override or (self.log_a.exp(), self.log_b.exp())

    def forward(self, v: Tensor) -> Tensor:
        """Return w; computed in at least float32."""
        a, b = self.values
        wide = v.to(torch.promote_types(v.dtype, torch.float32))
        w: Tensor = a * _FUNCTIONS[self.settings.shape].forward(wide / b)
        return w.to(v.dtype)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return v for a weight: itself for a plain start, ψ⁻¹ for a matched one."""
        if self.settings.start == "plain":
            return w
        a, b = self.values
        function = _FUNCTIONS[self.settings.shape]
        y = w.to(torch.promote_types(w.dtype, torch.float32)) / a
        most = 0.98 * function.limit
        self.clipped = int((y.abs() > most).sum())
        v: Tensor = b * function.inverse(y.clamp(-most, most))
        return v.to(w.dtype)


def compand(
    model: nn.Module,
    settings: WeightCompander | None = None,
    targets: str | Sequence[str] = "*",
) -> dict[str, Compander]:
    """Put companders on the weights of linear and convolutional layers, in place.

    Args:
        model: any module.  Optimizers must be made afterwards: the parameters are new ones.
        settings: see `WeightCompander`.
        targets: patterns of module names.

    Returns:
        The companders by the name of their module.

    Raises:
        ValueError: a pattern without a match, a weight that is parametrized already (put the
            compander on first), shared, not floating, or without spread.
    """
    settings = settings or WeightCompander()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    }
    chosen: list[str] = []
    for pattern in [targets] if isinstance(targets, str) else targets:
        hits = [name for name in layers if fnmatchcase(name, pattern)]
        if not hits:
            raise ValueError(
                f"targets: nothing matches {pattern!r}; candidates are {', '.join(layers)}."
            )
        chosen += [name for name in hits if name not in chosen]
    pointers = [p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False)]
    made = {}
    for name in chosen:
        module = layers[name]
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"{name}: its weight is parametrized already; compand it first.")
        if not module.weight.is_floating_point():
            raise ValueError(f"{name}: its weight is {module.weight.dtype}, not floating.")
        if pointers.count(module.weight.data_ptr()) > 1:
            raise ValueError(f"{name}: its weight is shared; leave it out of targets.")
        made[name] = Compander(settings, module.weight)
    for name, each in made.items():
        parametrize.register_parametrization(layers[name], "weight", each)
    return made


def companders(model: nn.Module) -> dict[str, Compander]:
    """Return the companders of a model by the name of their module."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Compander):
            found[f".{name}".rsplit(".parametrizations.", 1)[0][1:]] = module
    return found


@contextmanager
def bound(
    model: nn.Module, a: Tensor | Sequence[float], b: Tensor | Sequence[float]
) -> Iterator[None]:
    """Run a block with other a and b, one of each for every compander; differentiable in them.

    Args:
        model: with companders.
        a: amplitudes in the layers' units, in the order of `companders`.
        b: widths in the layers' units.

    Raises:
        ValueError: another number of values than companders.
    """
    found = list(companders(model).values())
    if len(a) != len(found) or len(b) != len(found):
        raise ValueError(
            f"a and b must have one value for each of {len(found)} companders, but got {len(a)} "
            f"and {len(b)}."
        )
    try:
        for i, each in enumerate(found):
            each._override = a[i] * each.unit, b[i] * each.unit
        yield
    finally:
        for each in found:
            each._override = None


def bake(model: nn.Module) -> nn.Module:
    """Replace each companded weight by its value: a plain module again, in place.

    Raises:
        ValueError: the model has no compander.
    """
    names = list(companders(model))
    if not names:
        raise ValueError(f"{type(model).__name__} has no compander to bake.")
    for name in names:
        module = model.get_submodule(name)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model


@dataclass(frozen=True)
class LayerReport:
    """The weights of one layer.

    Attributes:
        a: amplitude.
        b: width.
        gamma: a/b.
        saturated: share of weights above 90 % of the bound; above .3 training stalls: raise a.
        near_zero: share of weights below a tenth of their standard deviation.
        tail: largest weight in standard deviations.
    """

    a: float
    b: float
    gamma: float
    saturated: float
    near_zero: float
    tail: float


@torch.no_grad()
def report(model: nn.Module) -> dict[str, LayerReport]:
    """Return what the companders make of the weights, by the name of their module."""
    found = {}
    for name, each in companders(model).items():
        w = cast(Tensor, model.get_submodule(name).weight).float().abs()
        a, b = (float(value) for value in each.values)
        spread = float(cast(Tensor, model.get_submodule(name).weight).float().std())
        limit = a * _FUNCTIONS[each.settings.shape].limit
        found[name] = LayerReport(
            a,
            b,
            a / b,
            float((w > 0.9 * limit).double().mean()),
            float((w < 0.1 * spread).double().mean()),
            float(w.max()) / spread,
        )
    return found


def hyperparameters(model: nn.Module) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Return log a and log b of each compander, for an optimizer or an outer level of your own."""
    return {name: (each.log_a, each.log_b) for name, each in companders(model).items()}
