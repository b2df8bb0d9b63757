"""The split optimizer as a `torch.optim.Optimizer`, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from adapters.split.layout import Part, Projector
from adapters.split.optimizer import Remainder, Split, Transport
from hypergrad.optimizers import Adam, Optimizer
from hypergrad.optimizers.flat import flatten, unflatten
from hypergrad.optimizers.values import constants
from hypergrad.tree import trainable_leaves

__all__ = ["SplitOptimizer"]


class SplitOptimizer(torch.optim.Optimizer):
    """`Split` on the parameters of a model, in place.

        optimizer = SplitOptimizer(model.parameters(), Basis(rank=8), lr=1e-3, remainder="sign")

    Matrices and larger tensors are split; vectors, such as biases and norms, are updated in full.
    The learning rate may be changed through ``param_groups[0]["lr"]``, as schedulers do.

    Args:
        params: parameters of one dtype and device, without groups.
        projector: how the subspace is chosen.
        lr: learning rate η.
        betas: of the Adam in the subspace.
        eps: of the Adam in the subspace.
        base: another rule for the subspace; it then brings betas and eps.
        full: parameters that are updated in full though they are matrices, such as embeddings.
        remainder: see `Split`.
        refresh: see `Split`.
        transport: see `Split`.
        error_feedback: see `Split`.
        decay_support: see `Split`.
        weight_decay: see `Split`.
        free_scale: see `Split`.
        projected_scale: see `Split`.

    Raises:
        ValueError: groups, parameters of several dtypes or devices, or settings that do not fit.
        RuntimeError: in `step`: a parameter without a gradient.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        projector: Projector,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        base: Callable[..., Optimizer] | None = None,
        full: Iterable[nn.Parameter] = (),
        remainder: Remainder = "none",
        refresh: int = 200,
        transport: Transport = "reset",
        error_feedback: bool = False,
        decay_support: bool = False,
        weight_decay: float = 0.0,
        free_scale: float = 1.0,
        projected_scale: float = 1.0,
    ) -> None:
        given = list(params)
        if any(isinstance(p, dict) for p in given):
            raise ValueError("params must be parameters; groups are not supported.")
        super().__init__(given, {"lr": lr})
        self._tensors = [p for p in given if p.requires_grad]
        kinds = {(p.dtype, p.device) for p in self._tensors}
        if len(kinds) != 1:
            raise ValueError(f"params must share one dtype and one device, but got {kinds}.")
        whole = {id(p) for p in full}
        parts = [
            Part(tuple(p.shape) or (1,), p.dim() > 1 and id(p) not in whole) for p in self._tensors
        ]
        rule = Adam(lr, betas, eps) if base is None else base(lr)
        self._rule = Split(
            rule,
            projector,
            tuple(parts),
            remainder,
            refresh,
            transport,
            error_feedback,
            decay_support,
            weight_decay,
            free_scale,
            projected_scale,
        )
        self._leaves = trainable_leaves(dict(enumerate(self._tensors)))
        self._state = self._rule.init(flatten([p.detach() for p in self._tensors]))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step with the gradients in ``.grad``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        missing = [i for i, p in enumerate(self._tensors) if p.grad is None]
        if missing:
            raise RuntimeError(f"parameters {missing} have no gradient; leave them out of params.")
        values = constants(self._rule.resolve({}, self._leaves))
        values["lr"] = float(self.param_groups[0]["lr"])
        flat = flatten(self._tensors)
        grad = flatten([p.grad for p in self._tensors if p.grad is not None])
        after, self._state = self._rule.update(flat, grad, self._state, values)
        for tensor, value in zip(self._tensors, unflatten(after, self._tensors), strict=True):
            tensor.copy_(value)
        return loss

    @property
    def state_bytes(self) -> int:
        """Bytes of all tensors of the state, the subspace among them."""
        return sum(v.nbytes for v in self._state.values() if isinstance(v, Tensor))

    def state_dict(self) -> dict[str, Any]:
        """The learning rate and the whole state."""
        return {"lr": self.param_groups[0]["lr"], "split": dict(self._state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: of another optimizer.
        """
        flat = flatten([p.detach() for p in self._tensors])
        self._rule.check_state(state_dict["split"], flat)
        self._state = dict(state_dict["split"])
        self.param_groups[0]["lr"] = state_dict["lr"]
