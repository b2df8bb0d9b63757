"""Sequences of tasks: groups of similar instructions, and what is remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ContinualMetrics",
    "InstructionGroups",
    "ParameterSets",
    "continual_metrics",
    "similarity",
]


def similarity(new: Sequence[str], old: Sequence[str]) -> float:
    """Return how similar two sets of instructions are, in [0, 1].

    The mean over the new texts of the largest TF-IDF cosine with an old one, with the vocabulary of
    both sets.  The published mean over all pairs gives a set of four paraphrases 0.42 with itself.

    Raises:
        ValueError: an empty set, or texts without a word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not new or not old:
        raise ValueError(f"instructions must not be empty, but got {len(new)} and {len(old)}.")
    both = TfidfVectorizer().fit([*new, *old])
    products = both.transform(new) @ both.transform(old).T
    return float(products.toarray().max(axis=1).mean())


@dataclass
class InstructionGroups:
    """Which tasks share a set of parameters: those with similar instructions.

    Attributes:
        threshold: τ in [0, 1]: similarity from which a set is used again.
        groups: instructions of each group.
        similar: ``(new, old) -> number in [0, 1]``, how similar two sets of texts are.

    Raises:
        ValueError: a threshold outside [0, 1], or a similarity outside it (or NaN) later.

    Source: Qiao et al., ICML 2025, section 3.3.
    """

    threshold: float = 0.6
    groups: list[list[str]] = field(default_factory=list)
    similar: Callable[[Sequence[str], Sequence[str]], float] = similarity

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], but got {self.threshold}.")

    def assign(self, instructions: Sequence[str]) -> tuple[int, bool]:
        """Return the group of a new task and whether it is new; the group learns the texts."""
        texts = list(dict.fromkeys(instructions))
        if not texts:
            raise ValueError("instructions must not be empty.")
        group, best = self._nearest(texts)
        if group is not None and best >= self.threshold:
            self.groups[group] += [t for t in texts if t not in self.groups[group]]
            return group, False
        self.groups.append(texts)
        return len(self.groups) - 1, True

    def route(self, instructions: Sequence[str]) -> int:
        """Return the group to use at test time.

        Raises:
            LookupError: no group is as similar as the threshold; names the nearest.
        """
        group, best = self._nearest(list(instructions))
        if group is None or best < self.threshold:
            raise LookupError(
                f"no group has similarity {self.threshold}; the nearest is {group} with {best:.2f}."
            )
        return group

    def _nearest(self, texts: Sequence[str]) -> tuple[int | None, float]:
        scores = [float(self.similar(texts, old)) for old in self.groups]
        for score in scores:
            if not -1e-9 <= score <= 1 + 1e-9:
                raise ValueError(f"similar must return a number in [0, 1], but got {score}.")
        best = max(range(len(scores)), key=lambda i: scores[i]) if scores else None
        return best, 0.0 if best is None else scores[best]


class ParameterSets:
    """One set of values for each group of tasks, in the parameters one at a time.

        sets = ParameterSets(params, InstructionGroups(0.6))
        sets.open(["Which card is meant?"])  # reuses the set of similar tasks, or starts a new one

    A new set starts from the values that the parameters had at the beginning.

    Args:
        params: the tensors that each group has its own values of, such as adapters.
        groups: decides; empty at first.

    Raises:
        ValueError: no parameter, or groups that hold tasks already.
    """

    def __init__(self, params: Mapping[str, Tensor], groups: InstructionGroups) -> None:
        if not params:
            raise ValueError("params must hold at least one tensor, but is empty.")
        if groups.groups:
            raise ValueError(f"groups must be empty, but holds {len(groups.groups)}.")
        self.params, self.groups = dict(params), groups
        self.active: int | None = None
        self._start = self._read()
        self._sets: list[dict[str, Tensor]] = []

    def open(self, instructions: Sequence[str]) -> tuple[int, bool]:
        """Put the set of a new task into the parameters; return its number and whether it is new.

        Raises:
            ValueError: no instructions, or a parameter that has changed its shape.
        """
        self._store()
        group, new = self.groups.assign(instructions)
        if new:
            self._sets.append(self._start)
        self._write(group)
        return group, new

    def use(self, group: int) -> None:
        """Put a set into the parameters, for evaluation or to train on.

        Raises:
            IndexError: no such set.
            ValueError: a parameter has changed its shape.
        """
        if not 0 <= group < len(self._sets):
            raise IndexError(f"group must lie in 0 ... {len(self._sets) - 1}, but got {group}.")
        self._store()
        self._write(group)

    def state_dict(self) -> dict[str, Any]:
        """Every set, the instructions of each, and which one is in the parameters."""
        self._store()
        return {
            "sets": [dict(each) for each in self._sets],
            "start": dict(self._start),
            "groups": [list(texts) for texts in self.groups.groups],
            "active": self.active,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a `state_dict` was taken; the active set is put into the parameters.

        Raises:
            ValueError: other names or shapes.
        """
        found = {n: tuple(v.shape) for n, v in state["start"].items()}
        expected = {n: tuple(p.shape) for n, p in self.params.items()}
        if found != expected:
            raise ValueError(f"state must have shapes {expected}, but got {found}.")
        self._sets, self._start = [dict(each) for each in state["sets"]], dict(state["start"])
        self.groups.groups[:] = [list(texts) for texts in state["groups"]]
        if state["active"] is not None:
            self._write(state["active"])

    def _read(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.params.items()}

    def _store(self) -> None:
        for name, parameter in self.params.items():
            if parameter.shape != self._start[name].shape:
                raise ValueError(
                    f"{name} had shape {tuple(self._start[name].shape)}, but now has "
                    f"{tuple(parameter.shape)}."
                )
        if self.active is not None:
            self._sets[self.active] = self._read()

    @torch.no_grad()
    def _write(self, group: int) -> None:
        for name, parameter in self.params.items():
            parameter.copy_(self._sets[group][name])
        self.active = group


@dataclass(frozen=True)
class ContinualMetrics:
    """What a sequence of T tasks left behind.

    Attributes:
        average: mean accuracy on all tasks at the end.
        forgetting: mean over tasks but the last of (best accuracy so far − accuracy at the end).
        new: mean accuracy on each task just after it.
        backward_transfer: mean over tasks but the last of (accuracy at the end − just after it).
    """

    average: float
    forgetting: float
    new: float
    backward_transfer: float


def continual_metrics(accuracy: Tensor) -> ContinualMetrics:
    """Return the metrics of a matrix A[t, i], accuracy on task i after training on task t.

    Raises:
        ValueError: a matrix that is not square, with fewer than two tasks, or not finite.
    """
    if accuracy.dim() != 2 or accuracy.shape[0] != accuracy.shape[1] or len(accuracy) < 2:
        raise ValueError(
            "accuracy must be square with at least two tasks, but has shape "
            f"{tuple(accuracy.shape)}."
        )
    if not accuracy.isfinite().all():
        raise ValueError("accuracy must be finite.")
    last, diagonal = accuracy[-1], accuracy.diagonal()
    count = len(accuracy)
    best = [accuracy[i : count - 1, i].max() for i in range(count - 1)]
    lost = [float(best[i] - last[i]) for i in range(count - 1)]
    gained = [float(last[i] - diagonal[i]) for i in range(count - 1)]
    return ContinualMetrics(
        float(last.mean()),
        sum(lost) / len(lost),
        float(diagonal.mean()),
        sum(gained) / len(gained),
    )
