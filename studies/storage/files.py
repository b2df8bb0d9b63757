"""The files of a study, beside its database: lock, checkpoints, artifacts."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import quote

from optuna.artifacts import (
    ArtifactMeta,
    FileSystemArtifactStore,
    get_all_artifact_meta,
    upload_artifact,
)
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

__all__ = ["Files"]


class Files:
    """Paths below one folder that all studies of a storage share.

        FOLDER/artifacts/              of every trial, as optuna-dashboard expects them
        FOLDER/STUDY/lock              held by the process that runs the study
        FOLDER/STUDY/trials/NUMBER.pt  checkpoint of an unfinished trial; final state of the best
        FOLDER/STUDY/hparams/NUMBER.pt final gradient-owned values of a complete trial

    Args:
        folder: of the storage.
        study: name of the study.
    """

    def __init__(self, folder: Path, study: str) -> None:
        self.root = folder
        self.artifacts = folder / "artifacts"
        own = quote(study, safe=" ")
        if own in (".", "..", "artifacts"):  # folders that are there already, not this study's
            own = "".join(f"%{byte:02X}" for byte in study.encode())
        self.study = folder / own
        self._trials = self.study / "trials"
        self._hparams = self.study / "hparams"

    def make(self) -> None:
        """Create the folders."""
        self.artifacts.mkdir(parents=True, exist_ok=True)
        self._trials.mkdir(parents=True, exist_ok=True)
        self._hparams.mkdir(parents=True, exist_ok=True)

    def checkpoint(self, number: int) -> Path:
        """Return where a trial's checkpoint is kept."""
        return self._trials / f"{number}.pt"

    def hparams(self, number: int) -> Path:
        """Return where the final gradient-owned values of a trial are kept."""
        return self._hparams / f"{number}.pt"

    def keep_only(self, numbers: Collection[int]) -> None:
        """Remove the checkpoints of all other trials, and what a killed process left of them."""
        keep = {self.checkpoint(number) for number in numbers}
        for path in self._trials.iterdir():
            if path.suffix == ".pt" and path not in keep:
                path.unlink(missing_ok=True)

    def upload(self, trial: FrozenTrial, storage: BaseStorage, files: Mapping[str, str]) -> None:
        """Store texts as artifacts of a trial, by file name."""
        store = FileSystemArtifactStore(self.artifacts)
        folder = tempfile.mkdtemp(dir=self.study)
        try:
            for name, text in files.items():
                path = Path(folder, name)
                path.write_text(text, encoding="utf-8")
                upload_artifact(
                    artifact_store=store,
                    file_path=str(path),
                    study_or_trial=trial,
                    storage=storage,
                )
        finally:
            shutil.rmtree(folder)

    def artifacts_of(self, trial: FrozenTrial, storage: BaseStorage) -> dict[str, str]:
        """Return file name -> id of a trial's artifacts; of several of a name the latest."""

        def written(meta: ArtifactMeta) -> int:
            path = self.artifacts / meta.artifact_id
            return path.stat().st_mtime_ns if path.exists() else 0

        # The database has them in no order; a trial has one of each pause.
        metas = sorted(get_all_artifact_meta(trial, storage=storage), key=written)
        return {meta.filename: meta.artifact_id for meta in metas}

    def read(self, artifact_id: str) -> str | None:
        """Return the text of an artifact; None where its file is lost.

        Raises:
            ValueError: the id leads out of the folder.
        """
        if Path(artifact_id).name != artifact_id:
            raise ValueError(f"artifact id must be a file name, but got {artifact_id!r}.")
        if not (self.artifacts / artifact_id).exists():
            return None
        with FileSystemArtifactStore(self.artifacts).open_reader(artifact_id) as reader:
            return reader.read().decode("utf-8")
