"""`bilevel study doctor` and `gc` on folders that were damaged on purpose."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import optuna
import pytest

from studies.commands.study_doctor import collect, examine_study
from studies.views.stored import StoredStudy
from tests.studies.console import console, study_file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    study_file(folder)
    done = console("study", "run", "small.toml", "--out", "out", "--quiet", cwd=folder)
    assert done.code == 0, done.err
    return folder / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def levels(out: Path) -> dict[str, str]:
    return {trouble.topic: trouble.level for trouble in examine_study(out)}


def open_trial(out: Path) -> Path:
    """A trial as a killed process leaves it; returns where its checkpoint would be."""
    study = StoredStudy(out)
    return study.files.checkpoint(study.optuna.ask().number)


def test_a_whole_study_has_no_troubles(made: Path) -> None:
    assert set(levels(made).values()) == {"ok"}
    assert console("study", "doctor", made, cwd=made).code == 0


def test_open_trial_and_torn_checkpoint(out: Path) -> None:
    path = open_trial(out)
    assert levels(out)["open trials"] == "warning"
    path.write_bytes(b"PK\x03\x04 torn")
    assert levels(out)["checkpoint"] == "error"
    assert console("study", "doctor", out, cwd=out).code == 1
    assert console("study", "doctor", out, "--fix", cwd=out).code == 0
    assert not path.exists()
    done = console("study", "resume", out, "--trials", "4", "--json", "--quiet", cwd=out)
    assert done.json["complete"] == 4


def test_torn_files_of_complete_trials(out: Path) -> None:
    study = StoredStudy(out)
    best = study.best.number
    files = {
        "checkpoint": study.files.checkpoint(best),
        "final values": study.files.hparams(best),
    }
    for topic, path in files.items():
        assert path.exists()
        path.write_bytes(path.read_bytes()[:-100])
        assert levels(out)[topic] == "error"
    assert console("study", "doctor", out, "--fix", cwd=out).code == 0
    assert not any(path.exists() for path in files.values())
    done = console("study", "resume", out, "--trials", "4", "--json", "--quiet", cwd=out)
    assert done.json["complete"] == 4


def test_missing_artifact(out: Path) -> None:
    study = StoredStudy(out)
    (study.files.artifacts / study.artifacts(1)["trace.json"]).unlink()
    (found,) = [t for t in examine_study(out) if t.topic == "artifacts"]
    assert found.level == "error"
    assert "trace.json of trial 1" in found.value
    assert study.artifact("trace.json", 1) is None


def test_leftover_files(out: Path) -> None:
    study = StoredStudy(out)
    left = study.files.checkpoint(0).with_name(".0.pt.123.tmp")
    left.write_bytes(b"half")
    assert levels(out)["temporary files"] == "warning"
    assert console("study", "doctor", out, "--fix", cwd=out).code == 0
    assert not left.exists()


def test_damaged_database(out: Path) -> None:
    path = out / "study.db"
    data = bytearray(path.read_bytes())
    data[4096:40960] = b"\xa5" * 36864
    path.write_bytes(bytes(data))
    assert "error" in levels(out).values()
    path.write_text("no database at all\n" * 500)
    assert levels(out)["sqlite"] == "error"
    done = console("study", "doctor", out, "--json", cwd=out)
    assert done.code == 1
    assert done.err == ""


def test_other_schema_and_torn_spec(out: Path) -> None:
    connection = sqlite3.connect(out / "study.db")
    with connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    connection.close()
    assert levels(out)["database"] == "error"
    (out / "spec.json").write_text('{"format": 1, ')
    assert levels(out)["spec.json"] == "error"


def test_gc_keeps_what_is_used(out: Path) -> None:
    study = StoredStudy(out)
    best = study.best.number
    other = study.files.checkpoint((best + 1) % 3)
    other.write_bytes(study.files.checkpoint(best).read_bytes())
    stray = study.files.artifacts / "stray"
    stray.write_text("of nobody")
    listed = console("study", "gc", out, cwd=out)
    assert other.exists()
    assert stray.exists()
    assert "could be removed" in listed.out
    done = console("study", "gc", out, "--delete", "--json", cwd=out).json
    assert {Path(file["path"]) for file in done["files"]} == {other, stray}
    assert not other.exists()
    assert not stray.exists()
    assert set(levels(out).values()) == {"ok"}
    assert study.files.checkpoint(best).exists()
    assert collect(out, False)["files"] == []


def test_gc_knows_the_artifacts_of_other_studies_of_the_database(out: Path) -> None:
    name = StoredStudy(out).name
    before = len(list((out / "artifacts").iterdir()))
    url = f"sqlite:///{out / 'study.db'}"
    optuna.create_study(study_name="another", storage=url)
    artifact = out / "note.txt"
    artifact.write_text("mine")
    optuna.artifacts.upload_artifact(
        artifact_store=optuna.artifacts.FileSystemArtifactStore(out / "artifacts"),
        file_path=str(artifact),
        study_or_trial=optuna.load_study(study_name="another", storage=url),
    )
    assert collect(out, True)["files"] == []
    assert len(list((out / "artifacts").iterdir())) == before + 1
    assert StoredStudy(out).name == name
