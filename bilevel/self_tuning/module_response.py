"""The response of a `ModuleInner`: one perturbation per example, linearized where asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel.self_tuning.data import rows_of
from bilevel.self_tuning.layers import initial_response
from bilevel.self_tuning.loader import COORDINATES, HyperSource
from bilevel.self_tuning.response import Mode, ResponseModel, Tensors
from hypergrad.tree import Tree

if TYPE_CHECKING:
    from bilevel.self_tuning.network import ModuleInner

__all__ = ["ModuleResponse"]


class ModuleResponse(ResponseModel):
    """See `ResponseModel`; a batch is a pair of the data and the seed of its draws."""

    can_linearize = True

    def __init__(self, inner: ModuleInner, source: HyperSource | None) -> None:
        self._inner, self._source = inner, source
        self.layout = inner.layout
        self.elsewhere = () if source is None else source.names

    def initial(self, mode: Mode, generator: torch.Generator) -> Tensors:
        """See `ResponseModel.initial`.

        Raises:
            ValueError: tied weights in STN mode.
        """
        tied = self._inner.converted.tied
        if tied and mode == "stn":
            raise ValueError(
                f"mode='stn' cannot tune tied weights, but {' and '.join(map(repr, tied[0]))} "
                "share one: each use would have a response of its own, so that no plain tied "
                "network equals the tuned one.  Use mode='delta', untie them, or list them in "
                "plain=."
            )
        like = next(iter(self._inner.params.values()))
        return {
            name: initial_response(name.rpartition(".")[2], shape, fan_in, mode, generator).to(like)
            for name, (shape, fan_in) in self._inner.converted.response_shapes().items()
        }

    def draw(self) -> tuple[Any, Tensor | None]:
        """See `ResponseModel.draw`."""
        if "perturbed" not in self._inner.splits:
            return self._inner.inner_batches(1)[0], None
        batch = self._inner.draw("perturbed")
        data = batch[0]
        if not isinstance(data, dict) or COORDINATES not in data:
            raise ValueError(
                f"perturbed: a batch must have the entry {COORDINATES!r} that AugmentedDataset "
                f"adds, but got {sorted(data) if isinstance(data, dict) else type(data)}."
            )
        return batch, data[COORDINATES]

    def rows(self, batch: Any) -> int | None:
        """The number of examples."""
        return rows_of(batch[0])

    def training_loss(
        self,
        params: Tree,
        response: Tensors | None,
        shift: Tensor | None,
        coordinates: Tensor,
        batch: Any,
        linearized: bool = False,
    ) -> Tensor:
        """See `ResponseModel.training_loss`."""
        data, seed = batch
        if coordinates.dim() == 1:
            coordinates = coordinates.expand(rows_of(data), -1)
        values = self.layout.values(coordinates)
        tensors = params if response is None else {**params, **response}
        return self._inner.objective.training_loss(
            tensors, values, data, seed, shift=shift, linearized=linearized
        )

    def outer_loss(
        self, params: Tree, response: Tensors, shift: Tensor, coordinates: Tensor, batch: Any
    ) -> Tensor:
        """See `ResponseModel.outer_loss`."""
        data, seed = batch
        return self._inner.objective.outer_loss({**params, **response}, data, seed, shift)

    def effective(self, params: Tree, response: Tensors, shift: Tensor) -> Tree:
        """See `ResponseModel.effective`."""
        from bilevel.self_tuning.layers import materialize

        found = dict(params)
        for path, layer in self._inner.converted.layers.items():
            for name in layer.responding:
                prefix = f"{path}." if path else ""
                full = f"{prefix}{name}"
                if full not in params:  # a tied parameter goes by its first name
                    continue
                found[full] = materialize(
                    params[full],
                    response[f"{prefix}response_{name}"],
                    response[f"{prefix}gate_{name}"],
                    shift,
                    layer.gated_dim,
                )
        return found

    def publish(self, center: Tensor, sigma: Tensor) -> None:
        """See `ResponseModel.publish`."""
        if self._source is not None:
            self._source.update(center, sigma)
