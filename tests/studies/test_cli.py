"""The command line as a person uses it: real processes, exit codes, one-sentence errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from studies.commands.cli import main
from tests.signals import interruptible

ROOT = Path(__file__).parents[2]
SMALL = ["--seeds", "1", "--trials", "2", "--budget", "400"]


def bilevel(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bilevel", *args],
        cwd=cwd, capture_output=True, text=True, env=environment(),
    )  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """One small comparison, and its folder."""
    folder = tmp_path_factory.mktemp("job")
    done = bilevel("tune", "breast_cancer", *SMALL, "--json", "--quiet", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder, json.loads(done.stdout)


def test_every_way_spends_the_same_budget(job: tuple[Path, dict[str, object]]) -> None:
    rows = {row["name"]: row for row in job[1]["rows"]}  # type: ignore[attr-defined, index, union-attr]
    assert list(rows) == ["default", "default-long", "random", "tpe", "gradient", "hybrid"]
    for name in ("default-long", "random", "tpe"):
        assert rows[name]["equivalent_steps"] == [400]
    # Trials of a bracket stop after the outer step that reaches a level, not in the middle of it.
    for name, most in (("gradient", 400), ("hybrid", 420)):
        assert 300 < rows[name]["equivalent_steps"][0] <= most
    assert len(rows["gradient"]["hparams"]) >= 8
    assert rows["gradient"]["hparams"]["weight_decay"]["shape"] == [64 * 30 + 64 * 64 + 64 * 2]


def test_files_are_where_it_says(job: tuple[Path, dict[str, object]]) -> None:
    folder, found = job
    files = found["files"]
    page = (folder / files["report"]).read_text()  # type: ignore[index]
    assert "gradient-tuned" in page
    assert '<script src="http' not in page
    for picture in files["figures"]:  # type: ignore[index]
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG"
    assert (folder / "bilevel-out" / "breast_cancer.db").exists()


def test_again_shows_the_same_without_training(job: tuple[Path, dict[str, object]]) -> None:
    folder, found = job
    again = bilevel("tune", "breast_cancer", *SMALL, "--resume", "--json", "--quiet", cwd=folder)
    assert json.loads(again.stdout)["rows"] == found["rows"]
    table = bilevel("tune", "breast_cancer", *SMALL, "--quiet", cwd=folder).stdout
    for text in ("test loss", "gradient-tuned", "bilevel show", "breast_cancer.html"):
        assert text in table


def test_other_settings_are_refused(job: tuple[Path, dict[str, object]]) -> None:
    done = bilevel("tune", "breast_cancer", *SMALL, "--noise", "0.1", "--quiet", cwd=job[0])
    assert done.returncode == 4
    assert "task.options.noise: 0.3 before, 0.1 now" in done.stderr


def test_show_lists_the_studies(job: tuple[Path, dict[str, object]]) -> None:
    done = bilevel("show", "bilevel-out/breast_cancer.db", "--json", cwd=job[0])
    studies = json.loads(done.stdout)
    assert len(studies) == 6
    states = {s["study"]: (s["complete"], s["pruned"], s["trials"]) for s in studies}
    assert states.pop("breast_cancer / network / hybrid / seed 0") == (1, 2, 3)
    assert all(complete == trials for complete, _, trials in states.values())
    text = bilevel("show", "bilevel-out/breast_cancer.db", cwd=job[0]).stdout
    assert "breast_cancer / network / gradient / seed 0" in text


def test_list_and_version(tmp_path: Path) -> None:
    done = bilevel("list", "--json", cwd=tmp_path)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert {"digits", "breast_cancer"} <= set(found["tasks"])
    assert "network" in found["learners"]
    assert {"Implicit", "Unrolled", "Forward", "FiniteDifference"} <= set(found["estimators"])
    assert {"Descent", "SOBA", "AmIGO"} <= set(found["algorithms"])
    assert all(line for rows in found.values() for line in rows.values())
    assert "Descent" in bilevel("list", cwd=tmp_path).stdout
    assert "doctor" in bilevel(cwd=tmp_path).stdout
    assert bilevel("--version", cwd=tmp_path).stdout.startswith("bilevel ")


def test_doctor_reports_versions_and_devices(tmp_path: Path) -> None:
    found = json.loads(bilevel("doctor", "--json", cwd=tmp_path).stdout)
    topics = {finding["topic"]: finding for finding in found}
    assert topics["devices"]["value"].startswith("cpu")
    assert {"torch", "optuna", "package adapters", "package hypergrad"} <= set(topics)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tune", "digit"], "unknown task 'digit'"),
        (["tune", "digits", "--learner", "netwrok"], "unknown learner 'netwrok'"),
        (["tune", "digits", "--storage", "nosuch://x"], "nosuch"),
        (["tune", "digits", "--storage", "notes.txt"], "notes.txt"),
        (["tune", "digits", "--noise", "1.5"], "noise must lie in [0, 1), but got 1.5"),
        (["tune", "digits", "--budget", "100"], "100 equivalent steps are too few"),
        (["tune", "digits", "--out", "/proc/none"], "--out"),
        (["tune", "digits", "--resume"], "nothing stored"),
        (["tune", "digits", "--trials", "1"], "'--trials': Input should be greater than or equal"),
        (["tune", "digits", "--trials", "1"], "to 2, but got '1'."),
        (["tune", "digits", "--noise=much"], "but got 'much'."),
        (["tune", "digits", "--storage", "notes.txt/x.db"], "'notes.txt' is not a folder"),
        (["tune"], "Missing argument 'TASK'."),
        (["show", "missing.db"], "missing.db"),
        (["show", "notes.txt"], "notes.txt"),
    ],
)
def test_bad_input_is_one_sentence(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "notes.txt").write_text("not a database\n" * 100)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bilevel", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    written = capsys.readouterr()
    assert ended.value.code == 2, written.err
    assert message in written.err
    assert "Traceback" not in written.err
    assert written.out == ""


def test_ctrl_c_and_resume(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bilevel", "tune", "breast_cancer", *SMALL]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=interruptible,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "tpe" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=600) == 130, rest
    assert "--resume to go on" in rest
    resumed = bilevel(
        "tune", "breast_cancer", *SMALL, "--resume", "--json", "--quiet", cwd=tmp_path
    )
    whole = bilevel(
        "tune", "breast_cancer", *SMALL, "--out", "w", "--json", "--quiet", cwd=tmp_path
    )

    def numbers(text: str) -> list[dict[str, object]]:
        rows = json.loads(text)["rows"]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert numbers(resumed.stdout) == numbers(whole.stdout)
