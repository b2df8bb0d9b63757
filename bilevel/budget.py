"""How much a tuning run may spend."""

from __future__ import annotations

from dataclasses import dataclass, fields

from bilevel.metrics import Cost

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """Limits of a run, all totals: a resumed run counts what it had spent before.

    The run ends before the first outer step that does not fit, so `steps` and `outer_steps`
    are never exceeded.  The cost of a hypergradient is not known before it is computed:
    for `equivalent_steps` the next outer step is taken to cost as much as the costliest one
    so far.  No outer step begins after `seconds`.

    Attributes:
        steps: inner training steps.
        outer_steps: updates of the hyperparameters.
        equivalent_steps: gradients + 2 · Hessian-vector products, see `Cost.equivalent_steps`.
        seconds: wall time.

    Raises:
        ValueError: no limit is given, or one is not positive.
        TypeError: a limit is not a number.
    """

    steps: int | None = None
    outer_steps: int | None = None
    equivalent_steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {name: limit for name, limit in given.items() if limit is not None}
        if not given:
            raise ValueError(
                "budget: give at least one of steps, outer_steps, equivalent_steps and seconds."
            )
        for name, limit in given.items():
            kinds = (int, float) if name == "seconds" else (int,)
            if isinstance(limit, bool) or not isinstance(limit, kinds):
                expected = "a number" if name == "seconds" else "an integer"
                raise TypeError(f"budget: {name} must be {expected}, but got {limit!r}.")
            if not limit > 0:
                raise ValueError(f"budget: {name} must be positive, but got {limit!r}.")

    @classmethod
    def of(cls, budget: Budget | int) -> Budget:
        """Return a budget; a bare integer means steps."""
        return budget if isinstance(budget, Budget) else cls(steps=budget)

    def refuses(self, spent: Cost, outer_steps: int, ahead: Cost) -> str | None:
        """Say which limit forbids another outer step.

        Args:
            spent: the cost so far.
            outer_steps: outer steps so far.
            ahead: what the next outer step will cost: its steps exactly, the rest as expected.

        Returns:
            The limit in words, or None where the step fits.
        """
        steps, work = spent.steps + ahead.steps, spent.equivalent_steps + ahead.equivalent_steps
        if self.steps is not None and steps > self.steps:
            return f"{self.steps} steps"
        if self.outer_steps is not None and outer_steps >= self.outer_steps:
            return f"{self.outer_steps} outer steps"
        if self.equivalent_steps is not None and work > self.equivalent_steps:
            return f"{self.equivalent_steps} equivalent steps"
        if self.seconds is not None and spent.seconds >= self.seconds:
            return f"{self.seconds:g} seconds"
        return None

    def fraction(self, spent: Cost, outer_steps: int) -> float:
        """Return how much of the nearest limit is used up, between 0 and 1."""
        pairs = [
            (spent.steps, self.steps),
            (outer_steps, self.outer_steps),
            (spent.equivalent_steps, self.equivalent_steps),
            (spent.seconds, self.seconds),
        ]
        return min(1.0, max(used / limit for used, limit in pairs if limit is not None))
