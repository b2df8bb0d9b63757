"""A network as a function of its trained tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Functional", "copy_module", "own_class", "parametrized"]

Out = TypeVar("Out")
Kind = TypeVar("Kind", bound=nn.Module)


def copy_module(model: nn.Module) -> nn.Module:
    """Return a deep copy that shares nothing, not even the classes of parametrized modules.

    `copy.deepcopy` shares those, and merging a parametrization of the copy would then take the
    parametrized tensor away from the original.
    """
    clone = copy.deepcopy(model)
    for module in clone.modules():
        if parametrize.is_parametrized(module):
            own_class(module)
    return clone


def parametrized(model: nn.Module, kind: type[Kind]) -> dict[str, Kind]:
    """Return the parametrizations of a kind by the name of the module that they are on."""
    # Their own name is MODULE.parametrizations.TENSOR.0, or without MODULE on the model itself.
    return {
        f".{name}".rsplit(".parametrizations.", 1)[0][1:]: module
        for name, module in model.named_modules()
        if isinstance(module, kind)
    }


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class that no copy of it has."""
    shared = type(module)
    members = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)


class _Run(nn.Module):
    """Runs a function of a model as a forward, so that `functional_call` can swap tensors in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


class Functional:
    """Calls ``function(model, *args)`` with the model's trained tensors replaced.

    Any method, hook and parametrization of the model sees the replacements
    (`torch.func.functional_call`); a parametrized weight is computed once per call.

    Attributes:
        trained: the model's own tensors that are replaced, by name.
        frozen: its other parameters.
        buffers: its live buffers by name.

    Args:
        model: holds the frozen parameters and the buffers; their names do not change from here.
        set_mode: ``(model, training)`` switches the model to training or evaluation.

    Raises:
        ValueError: no parameter of the model requires grad.
    """

    def __init__(self, model: nn.Module, set_mode: Callable[[nn.Module, bool], None]) -> None:
        self.model = model
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        # Sorted, as optree sorts: names and the flat vector of their tensors go in one order.
        self.trained = dict(sorted(trained.items()))
        self.frozen = {n: p for n, p in model.named_parameters() if n not in trained}
        self.buffers = dict(model.named_buffers())
        if not self.trained:
            raise ValueError(
                f"{type(model).__name__}: no parameter requires grad, so there is nothing to train."
            )
        self._run = _Run(model)
        self._set_mode = set_mode
        self._training: bool | None = None
        self._parametrized = any(map(parametrize.is_parametrized, model.modules()))

    @property
    def constants(self) -> dict[str, Tensor]:
        """Live frozen parameters and buffers by name."""
        return self.frozen | self.buffers

    def __call__(
        self,
        function: Callable[..., Out],
        params: Mapping[str, Tensor],
        *args: Any,
        training: bool,
        live: bool = False,
    ) -> Out:
        """Call the function.

        Args:
            function: ``(model, *args) -> anything``.
            params: the trained tensors by name.
            *args: passed through.
            training: mode of the model.
            live: whether buffers that the call changes (running statistics) stay changed;
                otherwise it works on copies.
        """
        if training is not self._training:
            self._set_mode(self.model, training)
            self._training = training
        tensors = {f"model.{name}": value for name, value in params.items()}
        if not live:
            tensors |= {f"model.{n}": b.detach().clone() for n, b in self.buffers.items()}
        with parametrize.cached() if self._parametrized else nullcontext():
            return torch.func.functional_call(self._run, tensors, (function, *args))  # type: ignore[no-any-return]

    def write(self, params: Mapping[str, Tensor]) -> None:
        """Store trained values in the model itself."""
        with torch.no_grad():
            for name, value in params.items():
                self.trained[name].copy_(value)
