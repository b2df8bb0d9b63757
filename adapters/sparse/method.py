"""What sparse fine-tuning and split optimizers share as methods: which tensors are split."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from adapters.finetune import FineTune, head_of
from adapters.reparam import adaptable
from adapters.split import Part, Split
from bilevel.domains import Switch
from hypergrad.optimizers import Optimizer, Value

__all__ = ["HEAD", "SparseTune", "SplitTune"]

HEAD = Switch(default=True, doc="whether the last layer is trained, in full")


class SplitTune(FineTune):
    """Fine-tuning by a split optimizer: hidden weights are projected, the rest is updated in full.

    Attributes:
        parts: the trained tensors by name, in the order of the flat vector; there after `attach`.
    """

    parts: dict[str, Part]

    def attach(self, model: nn.Module) -> None:
        """Take the hidden weights as what is split."""
        split = self.split_names(model)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parts = {n: Part(tuple(p.shape), n in split) for n, p in sorted(trained.items())}

    def split_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that are split."""
        head = head_of(model)
        return [f"{name}.{p.tensor}" for name, p in adaptable(model).items() if name != head]

    def optimizer(self, hyper: Callable[[str], Value]) -> Optimizer:
        """The split optimizer of the method."""
        return self.split(hyper)

    @abstractmethod
    def split(self, hyper: Callable[[str], Value]) -> Split:
        """Return the split optimizer; see `Method.optimizer`."""


class SparseTune(SplitTune):
    """Sparse fine-tuning: chosen entries of hidden weights move, biases are frozen.

    The last layer is trained in full where the space's "head" is on, as a new one must be; LIFT's
    recipes freeze it.  The weight decay acts on what moves, as the penalty's gradient is projected.
    """

    def attach(self, model: nn.Module) -> None:
        """Freeze everything but the hidden weights and, with "head", the last layer."""
        kept, head = self.split_names(model), f"{head_of(model)}."
        whole = bool(self.setting.constants["head"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in kept or (whole and name.startswith(head)))
        super().attach(model)

    def split_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the split tensors by name, in the order of the flat vector."""
        named = dict(model.named_parameters())
        return {name: named[name] for name, part in self.parts.items() if part.split}
