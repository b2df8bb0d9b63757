"""Dropout whose rate is a hyperparameter, with one rate for each example."""

from __future__ import annotations

from torch import Tensor, nn

from bilevel.self_tuning.layers import pick
from bilevel.self_tuning.perturbation import Perturbation, dropout_mask

__all__ = ["SHARED", "LockedDropout", "TunedDropout"]


class TunedDropout(nn.Dropout):
    """`torch.nn.Dropout` whose rate is read from the hyperparameters of the call.

    `convert` turns `Dropout`, `Dropout1d`, `Dropout2d` and `LockedDropout` into one.

    Attributes:
        perturbation: shared by the network.
        key: name of the hyperparameter, and the index in it or None.
        shared: dimensions that one mask is shared over: those of a channel, or time.
    """

    perturbation: Perturbation
    key: tuple[str, int | None]
    shared: tuple[int, ...]
    plain_type: type[nn.Module]

    def attach(
        self,
        perturbation: Perturbation,
        key: tuple[str, int | None],
        shared: tuple[int, ...],
        plain_type: type[nn.Module],
    ) -> None:
        """Read the rate from now on; see the attributes."""
        self.perturbation, self.key = perturbation, key
        self.shared, self.plain_type = shared, plain_type

    def detach(self) -> None:
        """Be the plain layer again."""
        self.__class__ = self.plain_type  # type: ignore[assignment]
        del self.perturbation, self.key, self.shared, self.plain_type

    def forward(self, input: Tensor) -> Tensor:
        """Drop entries in training; the first dimension holds the examples."""
        if not self.training:
            return input
        rate = pick(self.perturbation.values, self.key)
        if isinstance(rate, Tensor) and rate.dim() == 1:
            if len(rate) != len(input):
                raise ValueError(
                    f"TunedDropout({self.key[0]!r}) got an input of {tuple(input.shape)}, but "
                    f"{len(rate)} examples are perturbed; keep the examples in the first dimension."
                )
            rate = rate.view(-1, *[1] * (input.dim() - 1))
        shape = [1 if i in self.shared else size for i, size in enumerate(input.shape)]
        mask = dropout_mask(rate, tuple(shape), input)
        return self.perturbation.through(input, lambda v: v * mask)


class LockedDropout(nn.Dropout):
    """Dropout with one mask for all time steps (Gal and Ghahramani 2016); (rows, time, ...)."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop features of whole sequences in training."""
        if not self.training or not self.p:
            return input
        return input * dropout_mask(self.p, (input.shape[0], 1, *input.shape[2:]), input)


SHARED: dict[type[nn.Module], tuple[int, ...]] = {
    nn.Dropout: (),
    nn.Dropout1d: (2,),
    nn.Dropout2d: (2, 3),
    LockedDropout: (1,),
}
"""Layers that `convert` can tune, and the dimensions that each shares its mask over."""
