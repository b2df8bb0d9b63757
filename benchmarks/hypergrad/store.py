"""What was measured, kept as JSON beside the page: a run replaces its own part of it only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.hypergrad.worker import Row

__all__ = ["Entry", "Store"]


@dataclass(frozen=True)
class Entry:
    """What a library did on a problem, and under which load.

    Attributes:
        rows: its methods.
        repeats: timed repeats at most.
        load: lowest and highest load average around the measurement.
    """

    rows: list[Row]
    repeats: int
    load: tuple[float, float]


class Store:
    """Entries by problem and library, and the times of `scaling`.

    Args:
        path: the JSON file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        exists = path is not None and path.exists()
        self.content: dict[str, Any] = json.loads(path.read_text()) if path and exists else {}

    def put(self, problem: str, library: str, entry: Entry) -> None:
        """Replace an entry."""
        self.content.setdefault(problem, {})[library] = asdict(entry)
        self._write()

    def put_scaling(self, times: dict[str, list[float]]) -> None:
        """Replace the times of `scaling`."""
        self.content["scaling"] = times
        self._write()

    def entries(self, problem: str, libraries: list[str]) -> dict[str, Entry]:
        """Return what is known of a problem, in the order of `libraries`."""
        kept = self.content.get(problem, {})
        return {
            name: Entry(
                [Row(**row) for row in kept[name]["rows"]],
                kept[name]["repeats"],
                tuple(kept[name]["load"]),
            )
            for name in libraries
            if name in kept
        }

    @property
    def scaling(self) -> dict[str, list[float]] | None:
        """The times of `scaling`, if they are known."""
        return self.content.get("scaling")

    def _write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")
