"""Sequences of tasks: groups of similar instructions, and what is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["ContinualMetrics", "InstructionGroups", "continual_metrics", "similarity"]


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

    Source: Qiao et al., ICML 2025, section 3.3.
    """

    threshold: float = 0.6
    groups: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], but got {self.threshold}.")

    def assign(self, instructions: Sequence[str]) -> tuple[int, bool]:
        """Return the group of a new task and whether it is new; the group learns the texts."""
        texts = list(dict.fromkeys(instructions))
        group, best = self._nearest(texts)
        if group is not None and best >= self.threshold:
            self.groups[group] += [t for t in texts if t not in self.groups[group]]
            return group, False
        if not texts:
            raise ValueError("instructions must not be empty.")
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
        scores = [similarity(texts, old) for old in self.groups]
        best = max(range(len(scores)), key=lambda i: scores[i]) if scores else None
        return best, 0.0 if best is None else scores[best]


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
        ValueError: a matrix that is not square, or with fewer than two tasks.
    """
    if accuracy.dim() != 2 or accuracy.shape[0] != accuracy.shape[1] or len(accuracy) < 2:
        raise ValueError(
            "accuracy must be square with at least two tasks, but has shape "
            f"{tuple(accuracy.shape)}."
        )
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
