"""The history of every hyperparameter over one run: read, export, replay."""

from __future__ import annotations

import csv
import io
import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.inner import Inner
from bilevel.metrics import Metrics

__all__ = ["SUMMARY", "Schedule"]

SUMMARY = ("min", "q25", "median", "q75", "max", "mean")
"""Columns of `Schedule.summary`."""


@dataclass(eq=False)
class Schedule(Mapping[str, NDArray[np.float64]]):
    """Values in force during training, one row for each change.

    ``schedule["step"]`` has the number of inner steps done when each row came into force, row
    0 being the initial values; ``schedule["lr"]`` has the values, shape (rows, *shape of lr).
    A tensor of more than `limit` elements is kept as quantiles only, see `summary`; its name
    is in `names` but is no key.

    Attributes:
        limit: most elements of a tensor whose full history is kept.
        names: every hyperparameter.
    """

    limit: int = 64
    names: tuple[str, ...] = ()
    _steps: list[int] = field(default_factory=list, repr=False)
    _rows: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)
    _large: dict[str, int] = field(default_factory=dict, repr=False)

    def record(self, step: int, hparams: Mapping[str, Tensor]) -> None:
        """Add a row: `hparams` are in force from inner step `step` on."""
        self.names = self.names or tuple(hparams)
        self._steps.append(step)
        for name, value in hparams.items():
            row = value.detach().to("cpu", torch.float64)
            kept = row.clone() if row.numel() <= self.limit else _summarize(row)
            self._rows.setdefault(name, []).append(kept)
            if row.numel() > self.limit:
                self._large[name] = row.numel()

    def amend(self, hparams: Mapping[str, Tensor]) -> None:
        """Replace the last row: its values were taken back before anything was trained on them."""
        step = self._steps.pop()
        for rows in self._rows.values():
            rows.pop()
        self.record(step, hparams)

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        if name == "step":
            return np.asarray(self._steps, dtype=np.float64)
        if name in self._large:
            raise KeyError(
                f"{name!r} has more than {self.limit} elements, so only quantiles were kept: use "
                f"schedule.summary({name!r}), or tune(..., history=N) to keep more."
            )
        return torch.stack(self._history(name)).numpy()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.columns() == other.columns()

    def __iter__(self) -> Iterator[str]:
        yield "step"
        yield from (name for name in self.names if name not in self._large)

    def __len__(self) -> int:
        return 1 + len(self.names) - len(self._large)

    def summary(self, name: str) -> NDArray[np.float64]:
        """Return minimum, quartiles, maximum and mean over the elements, shape (rows, 6)."""
        rows = self._history(name)
        if name not in self._large:
            rows = [_summarize(row) for row in rows]
        return torch.stack(rows).numpy()

    def rows(self, steps: int) -> int:
        """Return how many rows came into force in the first `steps` training steps; at least one.

        A later row is what would have come next: nothing was trained on it.
        """
        return max(1, bisect_left(self._steps, steps))

    def _history(self, name: str) -> list[Tensor]:
        if name not in self._rows:
            known = ", ".join(self.names)
            raise KeyError(f"{name!r} did not move in this run; the schedule has {known}.")
        return self._rows[name]

    def size(self, name: str) -> int:
        """Return the number of elements of a hyperparameter."""
        return self._large.get(name, self._history(name)[0].numel())

    def at(self, step: int) -> dict[str, Tensor]:
        """Return the values in force during inner step `step` (from 0), as float64 tensors.

        Raises:
            ValueError: some histories are kept as quantiles only.
        """
        if self._large:
            raise ValueError(
                f"the schedule of {list(self._large)} is kept as quantiles only; "
                "use tune(..., history=N) to keep it whole."
            )
        row = max(0, bisect_right(self._steps, step) - 1)
        return {name: self._rows[name][row].clone() for name in self.names}

    def replay(self, inner: Inner, steps: int) -> Iterator[Metrics]:
        """Train an inner level for `steps` steps on the recorded values; yield each step's metrics.

        Raises:
            ValueError: some histories are kept as quantiles only.
        """
        for step in range(steps):
            like = inner.hparams
            values = self.at(step)
            inner.set_hparams({name: values[name].to(like[name]) for name in self.names})
            yield inner.step()

    def columns(self) -> dict[str, list[float]]:
        """Return flat columns: ``lr``, ``mix[0]``, and ``wd.median`` where quantiles are kept."""
        columns: dict[str, list[float]] = {"step": [float(s) for s in self._steps]}
        for name in self.names:
            if name in self._large:
                table = self.summary(name)
                columns |= {f"{name}.{c}": table[:, i].tolist() for i, c in enumerate(SUMMARY)}
                continue
            values = self[name]
            for index in np.ndindex(values.shape[1:]):
                suffix = f"[{','.join(map(str, index))}]" if index else ""
                columns[name + suffix] = values[(slice(None), *index)].tolist()
        return columns

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `csv` into a file."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            file.write(self.csv())

    def csv(self) -> str:
        """Return `columns` as CSV; floats are written so that they read back equal."""
        text, columns = io.StringIO(newline=""), self.columns()
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        return text.getvalue()

    def to_json(self) -> str:
        """Return the whole schedule as JSON."""
        state = self.state_dict()
        rows = {name: table.tolist() for name, table in state["rows"].items()}
        return json.dumps({**state, "rows": rows})

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Return the schedule that `to_json` wrote."""
        state = json.loads(text)
        tables = {n: torch.tensor(t, dtype=torch.float64) for n, t in state["rows"].items()}
        return cls.from_state({**state, "rows": tables})

    def state_dict(self, rows: int | None = None) -> dict[str, Any]:
        """Return everything, or the first rows, as plain data."""
        return {
            "limit": self.limit,
            "names": list(self.names),
            "large": dict(self._large),
            "steps": list(self._steps[:rows]),
            "rows": {name: torch.stack(table[:rows]) for name, table in self._rows.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Schedule:
        """Return the schedule whose `state_dict` was `state`."""
        schedule = cls(state["limit"], tuple(state["names"]))
        schedule._steps = list(state["steps"])
        schedule._large = dict(state["large"])
        schedule._rows = {name: list(table.unbind()) for name, table in state["rows"].items()}
        return schedule


def _summarize(row: Tensor) -> Tensor:
    values = row.flatten().numpy()
    # numpy selects in linear time; torch.quantile sorts, and refuses more than 2^24 elements.
    quantiles = np.quantile(values, [0.0, 0.25, 0.5, 0.75, 1.0])
    return torch.from_numpy(np.append(quantiles, values.mean()))
