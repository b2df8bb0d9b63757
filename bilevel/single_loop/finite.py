"""Inner levels whose losses are averages over finite lists of batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from bilevel.inner import Inner
from bilevel.metrics import Metrics
from bilevel.problem_inner import ProblemInner
from bilevel.space import Space
from hypergrad import SGD, Problem
from hypergrad.optimizers import Optimizer
from hypergrad.problem import check_scalar
from hypergrad.tree import Tree

__all__ = ["FiniteInner", "FiniteSum", "finite"]


@runtime_checkable
class FiniteInner(Inner, Protocol):
    """An `Inner` that can list its batches: f = mean of f(·, b), F = mean of F(·, b).

    What a table of past gradients (SAGA) or a full pass (SPIDER) needs beyond a random stream.
    A sequence may build its batches on demand; asking twice for one must give the same data.
    """

    def inner_batch_list(self) -> Sequence[Any]:
        """Return all batches of the inner loss, in an order that never changes."""
        ...

    def outer_batch_list(self) -> Sequence[Any]:
        """Return all batches of the outer loss, in an order that never changes."""
        ...


def finite(inner: Inner, algorithm: str) -> FiniteInner:
    """Return `inner`, known to list its batches.

    Raises:
        TypeError: it cannot.
        ValueError: one of its lists is empty.
    """
    if not isinstance(inner, FiniteInner):
        raise TypeError(
            f"{algorithm} needs finite lists of batches, but {type(inner).__name__} only draws "
            "random ones; give inner_batch_list() and outer_batch_list(), as FiniteSum does, or "
            "use an algorithm for streams such as SOBA or SUSTAIN."
        )
    for which in ("inner_batch_list", "outer_batch_list"):
        if not len(getattr(inner, which)()):
            raise ValueError(f"{algorithm}: {type(inner).__name__}.{which}() is empty.")
    return inner


class FiniteSum(ProblemInner):
    """A `ProblemInner` over lists of batches:  f = 1/n Σᵢ f(w, h, bᵢ),  F = 1/m Σⱼ F(w, h, cⱼ).

    The random batches of `inner_batches` and `outer_batch` are uniform draws from the lists,
    with replacement, so that every direction is unbiased for the averages above.  Each batch
    counts the same; give batches of equal size where each sample should.

    Args:
        problem: the two losses, each the mean over one batch.
        params: initial weights, copied; leaves that require grad are trained.
        inner_batches: batches of the inner loss.
        outer_batches: batches of the outer loss.
        space: domains, all owned by the gradient.
        hparams: a tree of floating tensors; where there is a `space`, initial values by name.
        optimizer: the update rule of `step`.  Single-loop algorithms move the weights by their
            own rule and do not use it.
        test_batch: all test data, for the outer loss.
        seed: of the random draws.

    Raises:
        ValueError: an empty list, and what `ProblemInner` raises.
    """

    def __init__(
        self,
        problem: Problem,
        params: Tree,
        inner_batches: Sequence[Any],
        outer_batches: Sequence[Any],
        *,
        space: Space | None = None,
        hparams: Tree | None = None,
        optimizer: Optimizer | None = None,
        test_batch: Any = None,
        seed: int = 0,
    ) -> None:
        for name, batches in (("inner_batches", inner_batches), ("outer_batches", outer_batches)):
            if not len(batches):
                raise ValueError(f"{name} must hold at least one batch, but it is empty.")
        super().__init__(
            problem,
            params,
            optimizer=SGD(lr=0.1) if optimizer is None else optimizer,
            hparams=hparams,
            space=space,
            inner_batch=_stream(inner_batches, f"inner/{seed}"),
            outer_batch=_stream(outer_batches, f"outer/{seed}"),
            test_batch=test_batch,
        )
        self._lists = {"train": inner_batches, "val": outer_batches}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names that `evaluate` takes."""
        return tuple(dict.fromkeys([*self._lists, *super().splits]))

    def inner_batch_list(self) -> Sequence[Any]:
        """See `FiniteInner.inner_batch_list`."""
        return self._lists["train"]

    def outer_batch_list(self) -> Sequence[Any]:
        """See `FiniteInner.outer_batch_list`."""
        return self._lists["val"]

    def evaluate(self, split: str) -> Metrics:
        """Return the average f as "train", the average F as "val"; see `Inner.evaluate`."""
        if split not in self._lists:
            return super().evaluate(split)
        loss = self.problem.inner_loss if split == "train" else self.problem.outer_loss
        total = 0.0
        with torch.no_grad():
            for batch in self._lists[split]:
                value = loss(self.params, self.hparams, batch)
                check_scalar(value, f"loss on {split!r}")
                total += float(value)
        return Metrics({"loss": total / len(self._lists[split])})


def _stream(batches: Sequence[Any], seed: str) -> Callable[[int], Any]:
    """Return t -> a batch, uniform and a pure function of t: a resumed run draws the same."""
    return lambda t: batches[random.Random(f"{seed}/{t}").randrange(len(batches))]
