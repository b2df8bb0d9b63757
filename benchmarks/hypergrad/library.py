"""What a library must say about itself to be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.hypergrad.problems import Stationary, Training

__all__ = ["Library", "Method"]


@dataclass(frozen=True)
class Method:
    """One way to compute the hypergradient of one problem.

    Attributes:
        name: such as "Unrolled, replay".
        run: computes the hypergradient once, from scratch; its tensors are in the order of the
            problem's hyperparameters.
        compiles: the first call compiles; its time is reported apart.
        single: float32 only, so its error is that of float32.
    """

    name: str
    run: Callable[[], Sequence[Tensor]]
    compiles: bool = False
    single: bool = False


@dataclass(frozen=True)
class Library:
    """A library, where it installs, and its methods.

    Attributes:
        name: key on the command line.
        title: name and version as measured.
        modules: what must be importable.
        methods: the methods that apply to a problem; none if the library cannot do it.
        requirements: packages for an environment of its own, on top of ours; empty if it is
            installed with this project.
        source: option that gives the path of its source, if it is not installed from an index.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    methods: Callable[[Training | Stationary], list[Method]]
    requirements: tuple[str, ...] = ()
    source: str | None = None
