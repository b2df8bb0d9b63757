"""The data side: augmentation at perturbed hyperparameters, in the workers of a loader."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bilevel.checks import did_you_mean
from bilevel.self_tuning.layout import Layout
from bilevel.space import Space

__all__ = ["COORDINATES", "AugmentedDataset", "HyperSource", "loader_stream"]

COORDINATES = "coordinates"
"""Entry of a batch that holds the λ' of each example."""


class HyperSource:
    """Current λ and σ in shared memory: the algorithm writes them, loader workers read them.

    An example that a worker prepared some steps ago was augmented at an older λ'.  It carries that
    λ' with it, and responses are taken at λ' - λ of the step that uses it, so nothing is lost.

    Args:
        space: the hyperparameters.
        names: those that the augmentation reads; it sees no others.
        per_batch: as given to `ModuleInner`; `SelfTuning` perturbs these, workers do not.
        integers: as given to `ModuleInner`.
        hparams: as given to `ModuleInner`.

    Raises:
        ValueError: `names` are not owned by the gradient, or some are in `per_batch`: a worker
            draws for one example at a time.
    """

    def __init__(
        self,
        space: Space,
        names: Collection[str],
        *,
        per_batch: Collection[str] = (),
        integers: Collection[str] = (),
        hparams: Mapping[str, Any] | None = None,
    ) -> None:
        values = space.validate(hparams or {}, dtype=torch.float32)
        owned = [name for name in space.grad if name in values]
        self.layout = Layout.of(space, owned, per_batch, integers)
        for name in names:
            if name not in owned or name in per_batch:
                raise ValueError(
                    f"names: {name!r} must be owned by the gradient and not in per_batch; "
                    f"{did_you_mean(name, [n for n in owned if n not in per_batch])}"
                )
        self.names = tuple(names)
        self.center = self.layout.coordinates(values).float()
        self.sigma = torch.zeros_like(self.center)
        for shared in (self.center, self.sigma):
            shared.share_memory_()  # type: ignore[no-untyped-call]

    def update(self, center: Tensor, sigma: Tensor) -> None:
        """Set λ and σ for all examples that are drawn from now on."""
        self.center.copy_(center.detach())
        self.sigma.copy_(sigma.detach())

    def draw(self, perturbed: bool) -> tuple[Tensor, dict[str, Any]]:
        """Return λ' of one example, shape (n,), and its constrained values of `names`.

        Uses torch's default generator, which a loader seeds differently in each worker.
        """
        point = self.center.clone()
        if perturbed:
            noise = torch.randn_like(point)
            for name in self.layout.per_batch:
                noise[self.layout.columns[name]] = 0
            point += self.sigma * noise
        values = self.layout.values(point)
        return point, {name: values[name] for name in self.names}


class AugmentedDataset(Dataset[dict[str, Any]]):
    """A map-style dataset whose examples are augmented at the current hyperparameters.

    Args:
        dataset: its examples are passed to `augment`.
        augment: ``(example, values) -> dict`` of tensors; values are those of one example.
        source: where λ and σ come from.
        perturbed: whether λ is perturbed; Δ-STN also needs the unperturbed examples, for its
            general weights.
    """

    def __init__(
        self,
        dataset: Any,
        augment: Callable[[Any, dict[str, Any]], Mapping[str, Any]],
        source: HyperSource,
        *,
        perturbed: bool,
    ) -> None:
        self._dataset, self._augment = dataset, augment
        self._source, self._perturbed = source, perturbed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        point, values = self._source.draw(self._perturbed)
        return {**self._augment(self._dataset[index], values), COORDINATES: point}


def loader_stream(loader: Iterable[Any]) -> Callable[[int], Any]:
    """Return a stream t -> batch that goes through a loader again and again.

    What a loader yields depends on when its workers read λ, so a resumed run is not bit for bit
    the uninterrupted one.
    """
    iterator = iter(loader)

    def stream(t: int) -> Any:
        nonlocal iterator
        try:
            return next(iterator)
        except StopIteration:
            iterator = iter(loader)
            return next(iterator)

    return stream
