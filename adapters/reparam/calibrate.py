"""What weight maps start from: inputs of layers and gradients of weights on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters.reparam.base import Need, as_matrix

if TYPE_CHECKING:
    from adapters.reparam.attach import Place

__all__ = ["Calibrate", "collect"]

Calibrate = Callable[[nn.Module], Tensor | None]

Found = tuple[Tensor | None, Tensor | None]


def collect(
    model: nn.Module,
    places: Mapping[str, Place],
    needs: frozenset[Need],
    calibrate: Calibrate | None,
) -> dict[str, Found]:
    """Run a model on calibration data once, in evaluation mode and without changing it.

    Args:
        model: before any map is on it.
        places: the weights.
        needs: "inputs", "gradient", both or none.
        calibrate: ``(model) -> loss``; the loss is needed for gradients only.

    Returns:
        Rows of inputs (n, inputs) and ∂L/∂W₀ as a matrix, by module.

    Raises:
        ValueError: no calibration data, a layer that got no input, a loss that is missing or
            does not depend on a weight, or statistics that are not finite.
    """
    if not needs:
        return {}
    if calibrate is None:
        raise ValueError(
            f"this weight map starts from {' and '.join(sorted(needs))}, so it needs calibrate=, "
            "a function that runs the model on training data."
        )
    rows: dict[str, list[Tensor]] = {name: [] for name in places}
    hooks = []
    if "inputs" in needs:
        for name, place in places.items():
            hooks.append(
                place.module.register_forward_pre_hook(_recorder(rows[name]), with_kwargs=True)
            )
    modes = {module: module.training for module in model.modules()}
    marks = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for place in places.values():
            place.weight.requires_grad_("gradient" in needs)
        with torch.set_grad_enabled("gradient" in needs):
            loss = calibrate(model)
            gradients = _gradients(loss, places) if "gradient" in needs else {}
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
        for parameter, mark in marks.items():
            parameter.requires_grad_(mark)
    found: dict[str, Found] = {}
    for name in places:
        inputs = torch.cat(rows[name]) if rows[name] else None
        if "inputs" in needs and (inputs is None or not len(inputs)):
            raise ValueError(
                f"{name}: it got no input. The calibration data are empty, or it is never called: "
                "the output projection of MultiheadAttention is read as a tensor; leave it out of "
                "targets."
            )
        for value in (inputs, gradients.get(name)):
            if value is not None and not value.isfinite().all():
                raise ValueError(
                    f"{name}: its inputs or gradients on calibration data are not finite."
                )
        found[name] = inputs, gradients.get(name)
    return found


def _gradients(loss: Tensor | None, places: Mapping[str, Place]) -> dict[str, Tensor]:
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        raise ValueError(
            f"calibrate must return a scalar loss that depends on the weights, but got {loss!r}."
        )
    weights = [place.weight for place in places.values()]
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    found = {}
    for (name, place), grad in zip(places.items(), grads, strict=True):
        if grad is None:
            raise ValueError(f"{name}: the calibration loss does not depend on its weight.")
        found[name] = as_matrix(grad, place.fold)
    return found


def _recorder(rows: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(module, nn.MultiheadAttention):
            x = _only_sequence(args, kwargs)
        rows.append(_as_rows(module, x.detach()))

    return record


def _only_sequence(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what self-attention reads; the input projection is applied to all three alike."""
    names = ("query", "key", "value")
    given = [*args[:3], *(kwargs[name] for name in names if name in kwargs)]
    if any(each is not given[0] for each in given):
        raise ValueError(
            "inputs of attention from one sequence to another are not supported, as its input "
            "projection reads both; choose a map that needs no inputs."
        )
    sequence: Tensor = given[0]
    return sequence


def _as_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return the vectors that a layer's matrix is applied to, one a row."""
    if isinstance(module, nn.Embedding):
        raise ValueError("inputs of an Embedding are indices; choose a map that needs no inputs.")
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    if module.groups != 1 or isinstance(module.padding, str):
        raise ValueError("inputs of convolutions with groups or named padding are not supported.")
    one = isinstance(module, nn.Conv1d)
    pairs = [
        (1, v[0]) if one else v
        for v in (module.kernel_size, module.dilation, module.padding, module.stride)
    ]
    if one:
        x, pairs[2] = x.unsqueeze(2), (0, module.padding[0])
    patches = F.unfold(x, *pairs)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])
