"""Data-parallel losses: the mean over processes, differentiable to every order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import optree
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from hypergrad.flat import FlatSpace
from hypergrad.swap import Swap

__all__ = ["mean_loss"]


def mean_loss(
    loss: Callable[..., Tensor], group: dist.ProcessGroup | None = None
) -> Callable[..., Tensor]:
    """Return the mean of `loss` over the processes of a group, each with its part of a batch.

        inner_loss, outer_loss = mean_loss(inner_loss), mean_loss(outer_loss)

    With both losses of a nested problem wrapped, values and derivatives of every order are the
    same in all processes: those of one process with the whole batch, where a loss is a mean over
    its batch and the parts are equal in size.  Every estimator, and `Solver`, works unchanged, and
    parameters and hyperparameters that start equal stay equal.

    Whatever requires grad in the arguments, tensors in trees or parameters of modules, must have
    the same values in all processes and enter the loss in the same way, as the same code does on
    another part of the data.  As with `torch.nn.parallel.DistributedDataParallel`, every
    evaluation and every derivative is a collective operation: all processes have to enter it.
    Each makes its own random draws.

    Args:
        loss: ``(params, hparams, batch)``, ``(model, batch, hparams)`` or any other function of
            trees of tensors and modules that returns a scalar.
        group: None for all processes.

    Raises:
        RuntimeError: at a call, where `torch.distributed.init_process_group` was not.
    """

    def mean(*arguments: Any) -> Tensor:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "mean_loss averages over processes, but there are none; call "
                "torch.distributed.init_process_group first."
            )
        with ExitStack() as stack:
            value = loss(*[_copied(argument, group, stack) for argument in arguments])
        (total,) = _sum(group, value)
        return total / dist.get_world_size(group)

    return mean


def _copied(argument: Any, group: dist.ProcessGroup | None, stack: ExitStack) -> Any:
    """Return an argument with `_Copy` applied to all of its tensors that require grad."""
    if isinstance(argument, nn.Module):
        named = {k: p for k, p in argument.named_parameters() if p.requires_grad}
        copies = _copy(group, *named.values()) if named else ()
        stack.enter_context(Swap(argument).filled(dict(zip(named, copies, strict=True))))
        return argument
    leaves, spec = optree.tree_flatten(argument)
    moving = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    if not moving:
        return argument
    for i, copy in zip(moving, _copy(group, *[leaves[i] for i in moving]), strict=True):
        leaves[i] = copy
    return optree.tree_unflatten(spec, leaves)


class _Copy(Function):
    """x ↦ x, from a value that all processes share to the process's own; adjoint of `_Sum`.

    The derivative of a sum Σᵣ fᵣ(x) over processes r is a sum of derivatives, and the derivative
    of that one goes the same way: the two maps are each other's adjoint (Shoeybi et al. 2019,
    Megatron-LM, section 3).  All tensors go in one operation, which is one message, and whose
    order among others is the same in all processes.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Any, ...]:
        return None, *_sum(ctx.group, *bars)


class _Sum(Function):
    """x ↦ Σᵣ xᵣ, from the processes' own values to one that all share; adjoint of `_Copy`."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        space = FlatSpace.of(tensors)
        packed = space.pack(tensors)
        dist.all_reduce(packed, group=group)
        return tuple(space.unpack(packed))

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Any, ...]:
        return None, *_copy(ctx.group, *bars)


_copy: Callable[..., Sequence[Tensor]] = _Copy.apply
_sum: Callable[..., Sequence[Tensor]] = _Sum.apply
