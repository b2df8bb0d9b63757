"""TorchOpt's functional optimizers as they are, where they are right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType
from typing import Any

import optree
import torch
from torch import Tensor

from hypergrad.optimizers.base import Optimizer, State
from hypergrad.optimizers.convert import RULES
from hypergrad.optimizers.values import Value, Values

__all__ = ["TorchOpt", "as_optimizer"]

_WRONG = {
    "_scale_by_accelerated_adam": "the derivative of its fused operator leaves out eps; use "
    "use_accelerated_op=False or hypergrad.Adam",
    "_masked": "its mask is a tree of tensors, but an update sees one flat vector; use a tree of "
    "values in one of hypergrad's own rules, such as SGD",
    "clip_grad_norm": "its clipping coefficient is computed without a derivative",
}


@dataclass(frozen=True)
class TorchOpt(Optimizer):
    """A TorchOpt transformation, such as ``torchopt.adam(1e-3)``, as an `Optimizer`.

    It acts on the flat vector of all trained tensors.  Its hyperparameters are constants: to
    tune one, use a rule of ours, such as `SGD` or `Adam`, with a `Hyper`.  `torchopt.radam`,
    `adamax` and `adadelta` have no counterpart here.  Two limits are TorchOpt's
    own: bias corrections of Adam and schedules are rounded to float32 even in float64
    (hypergradients are right to about 1e-5 and 1e-8), and √v has an infinite derivative at v = 0
    unless ``eps_root > 0``, which makes the adjoint NaN and is reported.

    Attributes:
        transformation: pair of functions `init` and `update`.

    Raises:
        ValueError: for a transformation whose derivative is known to be wrong, with the reason.
    """

    transformation: Any

    def __post_init__(self) -> None:
        for function in _closures(self.transformation):
            _refuse(function)
        # Momentum without dampening keeps a flag for the first call in its closure instead of
        # its state.  After this call it is a pure function of the state.
        with torch.no_grad():
            zero = torch.zeros(1)
            self.transformation.update(
                zero, self.transformation.init(zero), params=zero, inplace=False
            )

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """None: they are constants inside of the transformation."""
        return {}

    @cached_property
    def _structure(self) -> optree.PyTreeSpec:
        return optree.tree_structure(
            self.transformation.init(torch.zeros(1)), none_is_leaf=True, namespace="torchopt"
        )

    def init(self, flat: Tensor) -> State:
        """The leaves of TorchOpt's state, numbered."""
        state = self._leaves(self.transformation.init(flat.detach()))
        return {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.items()}

    def update(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, State]:
        """See TorchOpt."""
        before = optree.tree_unflatten(self._structure, list(state.values()))
        move, after = self.transformation.update(grad, before, params=flat, inplace=False)
        return flat + move, self._leaves(after)

    def _leaves(self, tree: Any) -> State:
        leaves = optree.tree_leaves(tree, none_is_leaf=True, namespace="torchopt")
        return {str(i): leaf for i, leaf in enumerate(leaves)}


def as_optimizer(optimizer: Any) -> Any:
    """Return an `Optimizer`, wrapping a TorchOpt transformation; None passes.

    Raises:
        TypeError: for anything else.
    """
    if optimizer is None or isinstance(optimizer, Optimizer):
        return optimizer
    if callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None)):
        return TorchOpt(optimizer)
    hint, name = "", type(optimizer).__name__
    if type(optimizer) in RULES:
        hint = " Convert it with hypergrad.from_torch(optimizer, params)."
    elif isinstance(optimizer, type):
        kind = optimizer.__name__
        name = f"the class {kind}"
        if optimizer in RULES:
            hint = f" Convert it with hypergrad.from_torch(torch.optim.{kind}, lr=...)."
    raise TypeError(
        "optimizer must be a hypergrad optimizer (SGD, Adam, AdamW, RMSprop, Adagrad, Lion) or a "
        f"TorchOpt transformation such as torchopt.adam(1e-3), but got {name}.{hint}"
    )


def _closures(value: Any) -> Iterator[FunctionType]:
    """Yield every function that a transformation is made of."""
    if isinstance(value, tuple):
        for part in value:
            yield from _closures(part)
    elif isinstance(value, FunctionType):
        yield value
        for part in _variables(value).values():
            yield from _closures(part)


def _variables(function: FunctionType) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }


def _refuse(function: FunctionType) -> None:
    maker = function.__qualname__.split(".<locals>")[0]
    variables = _variables(function)
    reason = _WRONG.get(maker) if function.__module__.startswith("torchopt") else None
    if maker == "_trace" and variables.get("dampening"):
        reason = "its dampening depends on whether the closure was called before; use hypergrad.SGD"
    for name, value in variables.items():
        if isinstance(value, Tensor) and value.requires_grad:
            reason = f"its {name} is a tensor that requires grad; put it in hparams and use a Hyper"
    if reason:
        raise ValueError(f"TorchOpt transformation {maker!r} cannot be differentiated: {reason}.")
