"""Brackets: which trials are compared, and who moves the gradient-owned values in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from optuna.trial import FrozenTrial, Trial

from bilevel.space import Space
from studies.messages import Keep
from studies.record import TrialRecord
from studies.runner.ledger import Ledger
from studies.runner.schedulers import Ladder, Member, Scheduler, Verdict
from studies.sampling.spaces import samplable, sampled_space

__all__ = ["Brackets"]


class Brackets:
    """Trials in groups, in the order in which they were asked; all of it is in the database.

    Args:
        ledger: of the study.
        scheduler: decides.
        ladder: rungs of the trials.
        space: of the study.
        keep: trials are compared by their best rung so far, or by their last.
        grid: params to try before any are sampled, by mangled names.
    """

    def __init__(
        self,
        ledger: Ledger,
        scheduler: Scheduler,
        ladder: Ladder,
        space: Space,
        keep: Keep = "best",
        grid: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._grid, self._keep = grid, keep
        self._ledger, self._scheduler, self._ladder = ledger, scheduler, ladder
        self._spaces = {"gradient": space}
        if space.grad and samplable(space):
            self._spaces |= dict.fromkeys(("both", "sampler"), sampled_space(space))
        self._closed = False
        self.stops_settled = scheduler.stops_settled
        self._compares = bool(ladder.levels) or (scheduler.stops_settled and bool(space.grad))

    def enter(self, trial: Trial, trials: int) -> dict[str, Any]:
        """Give a trial its bracket, where it has none yet, and ask for its values."""
        known = self._ledger.get(trial.number).user_attrs
        if "bracket" not in known and self._compares:
            place = self._place(trial.number, trials)
            for name in ("by", "bracket"):  # in this order: who has a bracket is whole
                self._ledger.attribute(trial, name, place[name])
        return self._ledger.suggest(trial, self._spaces[known.get("by", "gradient")])

    def given(self) -> Mapping[str, Any] | None:
        """Return the params of the next trial where they are not left to the sampler."""
        asked = len(self._ledger.trials())
        return self._grid[asked] if asked < len(self._grid) else None

    def close(self) -> None:
        """No further trial will join: the last bracket is whole as it is."""
        self._closed = True

    def verdict(self, trial: FrozenTrial) -> Verdict:
        """Return what becomes of a trial at its last rung."""
        mine = trial.user_attrs.get("bracket")
        if mine is None or not self._ladder.levels:
            return Verdict.GO
        members = self._members(mine["index"]).get(mine["index"], [])
        whole = self._closed or len(members) >= mine["width"]
        return self._scheduler.verdict(trial.number, members, whole, self._ladder.levels)

    def _place(self, number: int, trials: int) -> dict[str, Any]:
        known = [t for t in self._ledger.trials() if "bracket" in t.user_attrs]
        last = max(known, key=lambda t: t.number, default=None)
        if last is not None:
            place = dict(last.user_attrs["bracket"])
            inside = sum(t.user_attrs["bracket"]["index"] == place["index"] for t in known)
            if inside < place["width"]:
                return {"bracket": place, "by": place["kinds"][inside]}
        width = min(self._ladder.width, max(1, trials - len(known)))
        kinds = ["gradient"] * width
        if "sampler" in self._spaces:
            members = self._members()
            given = max(0, len(self._grid) - number)
            earlier = [members[i] for i in sorted(members)]
            kinds = list(self._scheduler.kinds(width, earlier, given))
        place = {"index": 0 if last is None else place["index"] + 1, "width": width, "kinds": kinds}
        return {"bracket": place, "by": kinds[0]}

    def _members(self, only: int | None = None) -> dict[int, list[Member]]:
        """The trials of each bracket, or of one, seen so that smaller is better."""
        found: dict[int, list[Member]] = {}
        sign = self._ledger.signs[0]
        for trial in self._ledger.trials():
            place = trial.user_attrs.get("bracket")
            if place is None or only not in (None, place["index"]):
                continue
            record = TrialRecord.of(trial)
            outlook: Mapping[str, Any] = trial.user_attrs.get("outlook", {})
            member = Member(
                number=record.number,
                state=record.state,
                by=record.by,
                value=None if record.value is None else sign * record.value,
                rungs=self._scores({rung: sign * v for rung, v in record.rungs.items()}),
                gains={int(rung): gain for rung, gain in outlook.get("gains", {}).items()},
                settled=outlook.get("settled", False),
            )
            found.setdefault(place["index"], []).append(member)
        return found

    def _scores(self, values: Mapping[int, float]) -> dict[int, float]:
        """What a trial is worth at each rung: as it would come out of it there."""
        reached = sorted(values)
        if self._keep == "last":
            return dict(values)
        return dict(zip(reached, accumulate((values[r] for r in reached), min), strict=True))
