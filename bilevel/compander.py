"""Weight compander: every weight is a bounded function of a latent one.

    w = ψ(v; a, b) = a φ(v/b),   φ odd, increasing, bounded, φ'(0) = 1: arctan, softsign or tanh

|w| stays below a sup φ, and the slope at zero is γ = a/b: for γ > 1 small weights are expanded and
large ones compressed.  v is trained in place of w.  For arctan, SGD on v moves w by −η γ² cos⁴(w/a)
∂L/∂w to first order: weights near zero move faster, large ones freeze (derived).

a and b can be fixed, trained on the training loss as published, or tuned on the validation loss by
hypergradients.  Nothing in the training loss rewards regularization, and learning them there undoes
it.  In front of BatchNorm a has no effect.

Decay.  An optimizer's `weight_decay` acts on v: the penalty on w is ½ λ ψ⁻¹(w)², weaker by γ² near
zero, and a barrier at the bound.  `compander_training.squared_norm`
of the effective weights is the penalty on w instead,
whose solutions within the bound are those of the plain network (derived).

Source: Cakaj, Mehnert and Yang, Weight compander, arXiv 2306.16993.  The function and the treatment
of a and b are recalled and derived, not quoted: no official code is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "Compander",
    "WeightCompander",
    "bake",
    "bound",
    "compand",
    "companders",
    "load_baked",
    "some",
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

_NEAREST = 0.98
"""Share of the bound at which an inverted weight is clipped: ψ⁻¹ is infinite at the bound."""


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
        sharing: one a and b, in units, for each "layer", or "shared" by all.

    Raises:
        ValueError: a number that is not positive and finite, or an unknown name.
    """

    amplitude: float = 2.0
    gamma: float = 2.0
    shape: Shape = "arctan"
    start: Literal["plain", "matched"] = "plain"
    learned: bool = False
    sharing: Literal["layer", "shared"] = "layer"

    def __post_init__(self) -> None:
        for name in ("amplitude", "gamma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, but got {getattr(self, name)}.")
        names = {
            "shape": tuple(_FUNCTIONS),
            "start": ("plain", "matched"),
            "sharing": ("layer", "shared"),
        }
        for name, known in names.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, but got {getattr(self, name)!r}.")

    def logs(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return new log a and log b in units; parameters where they are learned."""
        wide = torch.promote_types(like.dtype, torch.float32)
        log_a, log_b = (
            torch.tensor(math.log(value), dtype=wide, device=like.device)
            for value in (self.amplitude, self.amplitude / self.gamma)
        )
        return (nn.Parameter(log_a), nn.Parameter(log_b)) if self.learned else (log_a, log_b)


class Compander(nn.Module):
    """The parametrization w = a φ(v/b) of one weight.

    Attributes:
        settings: φ and the start.
        unit: standard deviation of the weight at the start; a buffer, so that a saved network
            keeps it whatever weights it is loaded into.
        log_a: log a in units; a parameter where it is learned, else a buffer.
        log_b: log b in units.
        clipped: how many entries the last inversion could not represent.

    Raises:
        ValueError: a weight without spread, or one that is not finite.
    """

    unit: Tensor
    log_a: Tensor
    log_b: Tensor

    def __init__(
        self,
        settings: WeightCompander,
        weight: Tensor,
        logs: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        self.register_buffer("unit", wide.std(correction=0))
        if not bool(self.unit.isfinite()):
            raise ValueError("the weights are not finite.")
        if not float(self.unit) > 0:
            raise ValueError("the weights have no spread, so there is no unit for the amplitude.")
        for name, value in zip(("log_a", "log_b"), logs or settings.logs(weight), strict=True):
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        self.clipped = 0
        self._override: tuple[Tensor | float, Tensor | float] | None = None

    @property
    def limit(self) -> Tensor | float:
        """Bound of |w| now."""
        return self.values[0] * _FUNCTIONS[self.settings.shape].limit

    @property
    def values(self) -> tuple[Tensor | float, Tensor | float]:
        """a and b now."""
        return self._override or (self.log_a.exp() * self.unit, self.log_b.exp() * self.unit)

    def forward(self, v: Tensor) -> Tensor:
        """Return w; computed in at least float32."""
        a, b = self.values
        wide = v.to(torch.promote_types(v.dtype, torch.float32))
        w: Tensor = a * _FUNCTIONS[self.settings.shape].forward(wide / b)
        return w.to(v.dtype)

    def inverse(self, w: Tensor) -> Tensor:
        """Return v = ψ⁻¹(w), of w clipped at 98 % of the bound; sets `clipped`."""
        a, b = self.values
        function = _FUNCTIONS[self.settings.shape]
        y = w.to(torch.promote_types(w.dtype, torch.float32)) / a
        most = _NEAREST * function.limit
        self.clipped = int((y.abs() > most).sum())
        v: Tensor = b * function.inverse(y.clamp(-most, most))
        return v.to(w.dtype)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return v for a weight: itself for a plain start, ψ⁻¹ for a matched one."""
        return w if self.settings.start == "plain" else self.inverse(w)


def compand(
    model: nn.Module,
    settings: WeightCompander | None = None,
    targets: str | Sequence[str] = "*",
) -> dict[str, Compander]:
    """Put companders on the weights of linear and convolutional layers, in place.

    Args:
        model: any module.  An optimizer made before trains v, but no learned a and b.
        settings: see `WeightCompander`.
        targets: patterns of module names.

    Returns:
        The companders by the name of their module.

    Raises:
        ValueError: a pattern without a match, or a weight that is parametrized already (put the
            compander on first), computed by a hook, shared, not floating, not finite, or without
            spread.  Nothing is changed then.
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
    made, logs = {}, None
    for name in chosen:
        module = layers[name]
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"{name}: its weight is parametrized already; compand it first.")
        if "weight" not in module._parameters:
            raise ValueError(f"{name}: its weight is computed by a hook; compand it first.")
        if not module.weight.is_floating_point():
            raise ValueError(f"{name}: its weight is {module.weight.dtype}, not floating.")
        if pointers.count(module.weight.data_ptr()) > 1:
            raise ValueError(f"{name}: its weight is shared; leave it out of targets.")
        if settings.sharing == "shared" and logs is None:
            logs = settings.logs(module.weight)
        try:
            made[name] = Compander(settings, module.weight, logs)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
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
        a: amplitudes in the layers' units, in the order of `companders`; positive.
        b: widths in the layers' units; positive.

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
    for name in some(model, "bake"):
        module = model.get_submodule(name)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model


@torch.no_grad()
def load_baked(model: nn.Module, state: Mapping[str, Any]) -> dict[str, int]:
    """Load the state of a plain network into a companded one: v = ψ⁻¹(w), a and b as they are.

    Returns:
        How many entries of each layer were beyond 98 % of its bound and are clipped there.

    Raises:
        ValueError: the model has no compander, or the state no weight for one.
        RuntimeError: other keys or shapes, as `nn.Module.load_state_dict`.
    """
    own, loaded = model.state_dict(), dict(state)
    clipped = {}
    for name, each in some(model, "load into").items():
        key = f"{name}.weight" if name else "weight"
        prefix = f"{name}.parametrizations.weight." if name else "parametrizations.weight."
        if key not in loaded:
            raise ValueError(f"state has no {key!r}; it has {', '.join(loaded)}.")
        loaded |= {k: v for k, v in own.items() if k.startswith(prefix)}
        loaded[f"{prefix}original"] = each.inverse(loaded.pop(key).to(each.unit.device))
        clipped[name] = each.clipped
    model.load_state_dict(loaded)
    return clipped


def some(model: nn.Module, verb: str) -> dict[str, Compander]:
    """Return the companders of a model.

    Raises:
        ValueError: it has none; `verb` says what they are for.
    """
    found = companders(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no compander to {verb}.")
    return found
