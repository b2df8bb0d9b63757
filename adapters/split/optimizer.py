"""The split optimizer as an update rule of `hypergrad`: pure, so it can be unrolled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from adapters.split.layout import Part, Projector, Support
from hypergrad.optimizers import Optimizer, State, Value, Values
from hypergrad.optimizers.base import vectors
from hypergrad.optimizers.flat import scale
from hypergrad.optimizers.values import is_zero

__all__ = ["Split"]

Remainder = Literal["none", "sign", "sgd"]
Transport = Literal["reset", "keep", "move"]


@dataclass(frozen=True)
class Split(Optimizer):
    """An update rule in a subspace P, and a rule without state for the rest of the gradient.

        g ← ∇f(w) + e,   a = P g,   r = g − Pᵀ a
        w ← (1 − ηλ) w + κ_p (Pᵀ base(a) − η κ_f ρ(r)),   e ← r with error feedback

    where base(a) is the step of `base` on a, and ρ the remainder: 0, sign(r) or r.  At step 0 and
    every `refresh` steps P is chosen anew.  Hypergradients pass through everything but the
    discrete choices, which are locally constant: exact for coordinates and the DCT, and for the
    SVD as it stays in the graph.

    Attributes:
        base: the rule in the subspace; its weight decay must be 0.
        projector: how the subspace is chosen.
        parts: the trained tensors in the order of the flat vector.
        remainder: ρ.
        refresh: steps between two choices of the subspace; 0 for one choice only.
        transport: of the base's state at a refresh: "reset" it, "keep" it as it is (GaLore), or
            "move" it, with a step count for each entry, so that a new entry's first step is a
            first step.
        error_feedback: whether what was projected out is added to the next gradient.
        decay_support: whether weight decay acts on the subspace only, which must be entries.
        weight_decay: λ, decoupled.
        free_scale: κ_f.
        projected_scale: κ_p, on the split tensors only.
        marked_scale: the same on the marked tensors.
        refreshes: most refreshes; None for no limit.

    Raises:
        ValueError: contradictory settings, or a projector that does not fit the parts.
    """

    base: Optimizer
    projector: Projector
    parts: tuple[Part, ...]
    remainder: Remainder = "none"
    refresh: int = 0
    transport: Transport = "reset"
    error_feedback: bool = False
    decay_support: bool = False
    weight_decay: Value = 0.0
    free_scale: Value = 1.0
    projected_scale: Value = 1.0
    marked_scale: Value = 1.0
    refreshes: int | None = None

    ranges: ClassVar = {
        "weight_decay": (0.0, torch.inf),
        "free_scale": (0.0, torch.inf),
        "projected_scale": (0.0, torch.inf),
        "marked_scale": (0.0, torch.inf),
    }

    def __post_init__(self) -> None:
        for name, known in (
            ("remainder", ("none", "sign", "sgd")),
            ("transport", ("reset", "keep", "move")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, but got {getattr(self, name)!r}.")
        if self.refresh < 0:
            raise ValueError(f"refresh must not be negative, but got {self.refresh}.")
        if self.error_feedback and self.remainder != "none":
            raise ValueError(
                "error_feedback hands the rest to the next step, so remainder must be 'none', but "
                f"got {self.remainder!r}."
            )
        if not is_zero(self.base.hyperparameters.get("weight_decay", 0.0)):
            raise ValueError("base must have weight_decay=0; give it to Split.")
        if "lr" not in self.base.hyperparameters:
            raise ValueError(f"base must have a learning rate, but got {self.base}.")
        self.projector.check(self.parts)

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """Those of the base, and λ, κ_f, κ_p."""
        own = {
            "weight_decay": self.weight_decay,
            "free_scale": self.free_scale,
            "projected_scale": self.projected_scale,
            "marked_scale": self.marked_scale,
        }
        return {**self.base.hyperparameters, **own}

    def _check(self, key: str, value: float | Tensor) -> None:
        if key in self.ranges:
            super()._check(key, value)
        else:
            self.base._check(key, value)

    def init(self, flat: Tensor) -> State:
        """No subspace yet, and no error."""
        size = sum(part.size for part in self.parts)
        if size != flat.numel():
            raise ValueError(f"parts have {size} entries, but the flat vector has {flat.numel()}.")
        state: State = {"step": 0}
        return {**state, "error": torch.zeros_like(flat)} if self.error_feedback else state

    def check_state(self, state: State, flat: Tensor) -> None:
        """See `Optimizer.check_state`."""
        if not isinstance(state.get("step"), int) or (self.error_feedback != ("error" in state)):
            raise ValueError(f"optimizer state has entries {sorted(state)}, which are not Split's.")
        size = sum(part.size for part in self.parts)
        if flat.numel() != size or ("error" in state and len(state["error"]) != size):
            raise ValueError(
                f"optimizer state is for {size} entries, but these params have {flat.numel()}."
            )

    def update(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, State]:
        """See the formulas of the class."""
        lr, project = values["lr"], self.projector
        g = grad + state["error"] if self.error_feedback else grad
        support, inner = _unpack(state)
        step = state["step"]
        count = step // self.refresh if self.refresh else 0
        if not step or (
            self.refresh
            and step % self.refresh == 0
            and (self.refreshes is None or count <= self.refreshes)
        ):
            after = project.fit(self.parts, g, flat, count, support or None)
            inner = self._transported(support, after, inner, project.down(self.parts, after, g))
            support = after
        a = project.down(self.parts, support, g)
        base_values = {**values, "weight_decay": 0.0}
        move, inner = self.base.update(torch.zeros_like(a), a, inner, base_values)
        change = project.up(self.parts, support, move)
        state = {"step": step + 1}
        if self.error_feedback:
            state["error"] = g - project.up(self.parts, support, a)
        elif self.remainder != "none":
            rest = g - project.up(self.parts, support, a)
            rest = rest.sign() if self.remainder == "sign" else rest
            change = change - scale(scale(rest, lr), values["free_scale"])
        change = self._scaled(change, values["projected_scale"], [p.split for p in self.parts])
        change = self._scaled(change, values["marked_scale"], [p.marked for p in self.parts])
        flat = self._decayed(flat, lr, values["weight_decay"], support)
        return flat + change, {**state, **_pack(support, inner)}

    def _transported(
        self, before: Support, after: Support, inner: dict[str, Any], like: Tensor
    ) -> dict[str, Any]:
        fresh = self.base.init(torch.zeros_like(like))
        if self.transport == "move" and "step" in fresh:
            fresh["step"] = like.new_zeros(len(like), dtype=torch.float64)
        if not inner or self.transport == "reset":
            return fresh
        if self.transport == "keep":
            sizes = {len(v) for v in vectors(inner).values()}
            if sizes - {len(like)}:
                raise ValueError(
                    "transport='keep' needs subspaces of one size; use 'reset' or 'move'."
                )
            return inner
        moved = {}
        for key, value in inner.items():
            if isinstance(value, Tensor):
                square = key.endswith("_sq") or key == "step"
                moved[key] = self.projector.move(self.parts, before, after, value, square)
            else:
                moved[key] = value
        return moved

    def _scaled(self, change: Tensor, factor: float | Tensor, where: list[bool]) -> Tensor:
        """Multiply by a factor on some of the tensors."""
        if isinstance(factor, float) and factor == 1.0:
            return change
        pairs = zip(self.parts, where, strict=True)
        mark = torch.cat([change.new_full((part.size,), float(on)) for part, on in pairs])
        return change + mark * (scale(change, factor) - change)

    def _decayed(
        self, flat: Tensor, lr: float | Tensor, decay: float | Tensor, support: Support
    ) -> Tensor:
        if is_zero(decay):
            return flat
        loss = scale(scale(flat, lr), decay)
        if self.decay_support:
            kept = torch.zeros_like(flat)
            kept[support["index"]] = 1.0
            loss = loss * kept
        return flat - loss


def _pack(support: Support, inner: dict[str, Any]) -> State:
    return {
        **{f"support/{key}": value for key, value in support.items()},
        **{f"base/{key}": value for key, value in inner.items()},
    }


def _unpack(state: State) -> tuple[Support, dict[str, Any]]:
    support = {k[8:]: v for k, v in state.items() if k.startswith("support/")}
    inner = {k[5:]: v for k, v in state.items() if k.startswith("base/")}
    return support, inner
