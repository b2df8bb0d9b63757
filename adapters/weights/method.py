"""What all weight adapters share as methods: attach to the hidden layers, train, merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapters.finetune import FineTune, head_of
from adapters.method import Batch
from adapters.reparam import Reparam, adaptable, attach, configured, maps, merge

__all__ = ["WeightAdapter"]


class WeightAdapter(FineTune):
    """Fine-tuning through weight maps on all hidden layers; the last layer is trained as it is.

    Attributes:
        reparam: the kind of map.  Hyperparameters that are named like its settings set them;
            those that the gradient owns are put in where the loss is computed.
    """

    reparam: ClassVar[type[Reparam]]

    def settings(self) -> Reparam:
        """Return the map with the run's constants."""
        names = {field.name for field in dataclasses.fields(self.reparam)}  # type: ignore[arg-type]
        constants = self.setting.constants
        return self.reparam(**{n: constants[n] for n in names if n in constants})

    def targets(self, model: nn.Module) -> list[str]:
        """Return the names of the layers that get a map: all but the last one."""
        return [name for name in adaptable(model) if name != head_of(model)]

    def attach(self, model: nn.Module) -> None:
        """Freeze everything but the last layer and put the maps on."""
        attach(
            model,
            self.choose(model),
            train=f"{head_of(model)}.*",
            calibrate=self.calibrate,
        )

    def choose(self, model: nn.Module) -> Mapping[str, Reparam]:
        """Return the map of each target."""
        return dict.fromkeys(self.targets(model), self.settings())

    def predict(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return the outputs with the hyperparameters in the maps."""
        with configured(model, hparams):
            return super().predict(model, hparams, batch)

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor | None:
        """Return ½ λ ‖θ‖² and the maps' regularizer."""
        decay = super().penalty(model, hparams)
        with configured(model, hparams) as found:
            regularizer = self.regularizer([m.penalty() for m in found.values()])
        return decay if regularizer is None or decay is None else decay + regularizer

    def regularizer(self, each: Sequence[Tensor | None]) -> Tensor | None:
        """Return the regularizer made of each layer's: their sum."""
        given = [p for p in each if p is not None]
        return torch.stack(given).sum() if given else None

    def finish(self, model: nn.Module, hparams: Mapping[str, Any]) -> nn.Module:
        """Merge the maps, with the hyperparameters in them."""
        with configured(model, hparams):
            return merge(model) if maps(model) else model
