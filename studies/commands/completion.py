"""What a shell completes beside commands and options: folders of studies, and names."""

from __future__ import annotations

from pathlib import Path

from studies.storage.layout import SPEC

__all__ = ["learner_names", "study_folders", "task_names"]


def study_folders(incomplete: str) -> list[str]:
    """Return the folders of studies that begin with what was typed, one or two levels below it.

    Empty where there are none; a shell then completes any file.
    """
    typed = Path(incomplete)
    base = typed if incomplete.endswith("/") or not incomplete else typed.parent
    found = [spec.parent for deep in ("*", "*/*") for spec in base.glob(f"{deep}/{SPEC}")]
    return sorted(str(folder) for folder in found if str(folder).startswith(incomplete))


def task_names(incomplete: str) -> list[str]:
    """Return the names of tasks that begin with what was typed."""
    from adapters import tasks

    return [name for name in tasks.names() if name.startswith(incomplete)]


def learner_names(incomplete: str) -> list[str]:
    """Return the names of learners that begin with what was typed."""
    from adapters import registry

    return [name for name in registry.names() if name.startswith(incomplete)]
