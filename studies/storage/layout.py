"""Names of files in a study's folder; imports nothing, since a shell's completion waits for it."""

from __future__ import annotations

__all__ = ["DATABASE", "SPEC"]

DATABASE = "study.db"
"""SQLite file, where the study is not stored on a server."""

SPEC = "spec.json"
"""What the study was started with."""
