"""`bilevel study`: one small study from its file, looked at with every command, and wrong input."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import tomllib
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml

from studies import Study
from studies.storage.locks import coordinator_lock
from studies.views.stored import StoredStudy
from tests.studies.console import STUDY, Ended, console, interrupted_run, study_file
from tests.studies.trials import Walker


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A study of three trials in ``out``."""
    folder = tmp_path_factory.mktemp("study")
    study_file(folder)
    done = console("study", "run", "small.toml", "--out", "out", cwd=folder)
    assert done.code == 0, done.err
    return folder, done


def test_result_on_one_stream_and_progress_on_the_other(made: tuple[Path, Ended]) -> None:
    done = made[1]
    assert done.out.startswith("done: 3 trials (3 complete)  best ")
    assert len(done.out.splitlines()) == 1
    lines = done.err.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [
        ["trial", str(i), "COMPLETE"] for i in range(3)
    ]
    for part in ("val loss ", " lr=", "->", "|g| ", "40 steps", " s"):
        assert part in lines[0]
    assert "best so far" in lines[0]
    assert lines[-1] == "next: bilevel study dashboard out"


def test_same_command_again_trains_nothing_and_more_trials_go_on(
    made: tuple[Path, Ended], tmp_path: Path
) -> None:
    folder, done = made
    shutil.copytree(folder / "out", tmp_path / "out")
    study_file(tmp_path)
    again = console("study", "run", "small.toml", "--out", "out", "--quiet", cwd=tmp_path)
    assert (again.code, again.out, again.err) == (0, done.out, "")
    (tmp_path / "small.toml").unlink()
    more = console("study", "resume", "out", "--trials", "4", "--json", "--quiet", cwd=tmp_path)
    assert more.json["trials"] == 4
    whole = tmp_path / "whole"
    whole.mkdir()
    study_file(whole, STUDY.replace("trials = 3", "trials = 4"))
    console("study", "run", "small.toml", "--out", "out", "--quiet", cwd=whole)
    values = [[r.value for r in StoredStudy(f / "out").trials] for f in (tmp_path, whole)]
    assert values[0] == values[1]


def test_status(made: tuple[Path, Ended]) -> None:
    found = console("study", "status", "out", "--json", cwd=made[0]).json
    assert (found["learner"], found["task"]) == ("network", "digits")
    assert (found["state"], found["holder"], found["planned"]) == ("complete", None, 3)
    assert "3 of 3 finished" in console("study", "status", "out", cwd=made[0]).out
    study = StoredStudy(made[0] / "out")
    with coordinator_lock(study.files.study, study.name, study.database):
        held = console("study", "status", "out", "--json", cwd=made[0]).json
        assert held["state"] == "running"
        assert f"process {os.getpid()} on " in held["holder"]


def test_best_values_read_back_equal_in_every_form(made: tuple[Path, Ended]) -> None:
    found = {
        form: console("study", "best", "out", "--as", form, cwd=made[0]).out
        for form in ("json", "toml", "yaml", "py")
    }
    values = json.loads(found["json"])
    assert values == StoredStudy(made[0] / "out").best.hparams
    assert tomllib.loads(found["toml"]) == values
    assert yaml.safe_load(found["yaml"]) == values
    scope: dict[str, object] = {}
    exec(found["py"], scope)
    assert scope["hparams"] == values
    assert "1184" in found["json"]


def test_show_a_trial(made: tuple[Path, Ended]) -> None:
    text = console("study", "show", "out", "1", cwd=made[0]).out
    for part in ("trial", "1 of small: complete", "rungs", "schedule.json", "grad", "→", "sampler"):
        assert part in text
    found = console("study", "show", "out", "1", "--json", cwd=made[0]).json
    assert found["number"] == 1
    assert found["artifacts"] == ["schedule.csv", "schedule.json", "trace.json"]
    assert len(console("study", "show", "out", "--json", cwd=made[0]).json) == 3


def test_a_database_of_the_library_is_a_target_too(made: tuple[Path, Ended]) -> None:
    best = console("study", "best", "out/study.db", "--json", cwd=made[0])
    assert best.json["value"] == StoredStudy(made[0] / "out").best.value


def test_export(made: tuple[Path, Ended], tmp_path: Path) -> None:
    text = console("study", "export", "out", "csv", cwd=made[0]).out
    rows = list(csv.DictReader(io.StringIO(text)))
    best = StoredStudy(made[0] / "out").best
    assert float(rows[best.number]["value"]) == best.value
    assert float(rows[0]["hparams.layer_decay[0]"]) > 0
    assert rows[0]["hparams.weight_decay.shape"] == "1184"
    plain = console("study", "export", "out", "json", cwd=made[0]).json
    assert plain[best.number]["value"] == best.value
    to = tmp_path / "x.parquet"
    assert console("study", "export", "out", "parquet", "--to", to, cwd=made[0]).code == 0
    table = pyarrow.parquet.read_table(to).to_pylist()
    assert [row["number"] for row in table] == [0, 1, 2]
    assert table[0]["cost.steps"] == 40


def test_compare_takes_the_studies_of_one_database(tmp_path: Path) -> None:
    for name, sampler in (("a", "random"), ("b", "tpe"), ("c", "random")):
        space = Walker.space.fix(pace=0.0)
        Study(name, Walker, "digits", tmp_path / "all.db", space=space, sampler=sampler).run(2, 4)
    found = console("study", "compare", "all.db", "--json", cwd=tmp_path).json
    assert [row["target"] for row in found["studies"]] == ["a", "b", "c"]
    assert len(found["differences"]) == 1
    assert found["differences"][0].startswith("b: sampler: ")
    two = ("--study", "c", "--study", "a")
    text = console("study", "compare", "all.db", *two, cwd=tmp_path).out
    assert "no settings differ" in text
    for wrong, said in (
        (("all.db", "--study", "a"), "at least two studies, each once, but got 'a'"),
        (("all.db", "--study", "a", "--study", "a"), "each once, but got 'a', 'a'"),
        (("all.db", "--study", "a", "--study", "d"), "has no study 'd'"),
        (("all.db", "all.db"), "holds 3 studies; choose one with --study"),
        (("all.db", "all.db", "--study", "a"), "--study chooses among the studies of one"),
    ):
        done = console("study", "compare", *wrong, cwd=tmp_path)
        assert (done.code, said in done.err) == (2, True), done.err


def test_compare_with_pure_sampling_of_the_same_file(
    made: tuple[Path, Ended], tmp_path: Path
) -> None:
    other = tmp_path / "sampled"
    command = ("study", "run", "small.toml", "--own", "*=sampler", "--out", other, "--trials", "2")
    assert console(*command, "--quiet", cwd=made[0]).code == 0
    found = console("study", "compare", "out", other, "--json", cwd=made[0]).json
    assert [row["trials"] for row in found["studies"]] == [3, 2]
    assert any("robustness: owner 'grad' -> 'sampler'" in line for line in found["differences"])
    assert f"{other}: algorithm: Descent first, None here" in found["differences"]
    text = console("study", "compare", "out", other, cwd=made[0]).out
    assert "settings that differ" in text
    trial = StoredStudy(other).trials[0]
    assert "robustness" in trial.params
    assert trial.cost.hvps == 0


def test_other_settings_are_refused_and_change_nothing(made: tuple[Path, Ended]) -> None:
    before = (made[0] / "out" / "spec.json").read_text()
    for option, message in (
        (("--seed", "6"), "seed: 5 before, 6 now"),
        (("--own", "lr=grad"), "lr: owner 'sampler' -> 'grad'"),
        (("--own", "*=sampler"), "algorithm: Descent before, None now"),
        (("--budget", "50"), "budget.steps: 40 before, 50 now"),
    ):
        done = console("study", "run", "small.toml", "--out", "out", *option, cwd=made[0])
        assert done.code == 4
        assert message in done.err
        assert (made[0] / "out" / "spec.json").read_text() == before


def test_no_complete_trial_is_exit_code_1(tmp_path: Path) -> None:
    study_file(
        tmp_path,
        STUDY.replace(
            "width = 16",
            "lr = { owner = 'sampler', low = 1e30, high = 1e32, init = 1e31 }\nwidth = 16",
        ),
    )
    done = console("study", "run", "small.toml", "--out", "out", "--trials", "1", cwd=tmp_path)
    assert done.code == 1
    assert "FAILED" in done.err
    assert "no trial is complete; `bilevel study show out 0` says why" in done.err
    assert console("study", "status", "out", cwd=tmp_path).code == 1
    assert console("study", "best", "out", cwd=tmp_path).code == 1
    assert "diverged" in console("study", "show", "out", "0", cwd=tmp_path).out


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("run", "none.toml", "--out", "x"), "cannot read 'none.toml': No such file"),
    (("run", "notes.txt", "--out", "x"), "expected a file STUDY.toml"),
    (("run", "small.toml"), "Missing option '--out'"),
    (("run", "small.toml", "--out", "x", "--own", "lr"), "--own must be such as lr=sampler"),
    (("run", "small.toml", "--out", "x", "--own", "lrr=grad"), "did you mean 'lr'?"),
    (("run", "small.toml", "--out", "x", "--own", "width=grad"), "width cannot be owned by 'grad'"),
    (("run", "small.toml", "--out", "x", "--budget", "much"), "budget must be a number of steps"),
    (("run", "small.toml", "--out", "x", "--budget", "step=3"), "did you mean 'steps'?"),
    (("run", "small.toml", "--out", "x", "--trials", "0"), "--trials"),
    (("run", "small.toml", "--out", "notes.txt"), "--out"),
    (("run", "small.toml", "--out", "x", "--storage", "nosuch://x"), "nosuch"),
    (("run", "nosuch.module:plan", "--out", "x"), "there is no module 'nosuch.module'"),
    (("run", "studies.plan:plan", "--out", "x"), "did you mean 'Plan'?"),
    (("run", "studies.plan:study_options", "--out", "x"), "must be or return a studies.Plan"),
    (("run", "none.py:plan", "--out", "x"), "there is no file"),
    (("status", "none"), "there is no folder or database 'none'"),
    (("status", "."), "is not a study: it has no spec.json"),
    (("best", "notes.txt"), "is not a SQLite database"),
    (("resume", "none"), "there is no folder or database 'none'"),
    (("show", "OUT", "9"), "has trials 0 to 2, but not trial 9"),
    (("show", "OUT", "-1"), "No such option: -1"),
    (("show", "OUT", "one"), "unable to parse string as an integer, but got 'one'."),
    (("best", "OUT", "--as", "xml"), "'yaml', 'json', 'py', 'toml'"),
    (("export", "OUT", "xls"), "': 'xls' is not one of 'csv', 'parquet', 'json'."),
    (("export", "OUT", "csv", "--to", "none/x.csv"), "cannot write 'none/x.csv'"),
    (("export", "OUT", "parquet", "--to", "none/x"), "write 'none/x': No such file or directory."),
    (("compare", "OUT"), "at least two"),
    (("best", "OUT/study.db", "--study", "smal"), "did you mean 'small'?"),
    (("doctr", "OUT"), "No such command 'doctr'; known: run, resume,"),
    (("doctor", "none"), "there is no folder 'none'"),
    (("run", "small.toml", "--out", "x", "--learn", "no.csv"), "--learn: there is no file 'no.c"),
    (("run", "plans.py:fails", "--out", "x"), "failed: KeyError: 'alpha' ("),
    (("run", "plans.py:takes", "--out", "x"), "missing 1 required positional argument: 'alpha'."),
    (("run", "plans.py:failz", "--out", "x"), "known: fails, takes."),
    (("run", "imports.py:plan", "--out", "x"), "ModuleNotFoundError: No module named 'nosuch' ("),
    (("run", "broken.py:plan", "--out", "x"), "SyntaxError: '(' was never closed ("),
]  # fmt: skip


FILES = {
    "plans.py": """
from os import path

def fails():
    return {}["alpha"]

def takes(alpha):
    return alpha
""",
    "imports.py": "import nosuch\n",
    "broken.py": "plan = (\n",
}


@pytest.mark.parametrize(("args", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_input_is_one_sentence(
    args: tuple[str, ...],
    message: str,
    made: tuple[Path, Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study_file(tmp_path)
    (tmp_path / "notes.txt").write_text("not a database\n" * 100)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    for name in FILES:  # a module of this name may be of another folder
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    given = [arg.replace("OUT", str(made[0] / "out")) for arg in args]
    done = console("study", *given, cwd=tmp_path)
    assert done.code == 2, done.err
    assert message in done.err
    assert done.out == ""
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "x" / "spec.json").exists()


def test_a_typo_that_shows_late_leaves_no_study_behind(tmp_path: Path) -> None:
    study_file(tmp_path, 'metric = "los"' + STUDY)
    done = console("study", "run", "small.toml", "--out", "out", cwd=tmp_path)
    assert done.code == 2
    assert "metric must be one of ['accuracy', 'loss'], but got 'los'" in done.err
    assert not (tmp_path / "out").exists()
    study_file(tmp_path)
    assert (
        console("study", "run", "small.toml", "--out", "out", "--trials", "1", cwd=tmp_path).code
        == 0
    )


def test_help_of_the_commands_is_not_cut(tmp_path: Path) -> None:
    done = console("study", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out == console("study", "--help", cwd=tmp_path).out
    assert "..." not in done.out.partition("Commands:")[2]


@pytest.mark.slow
def test_ctrl_c_and_resume(made: tuple[Path, Ended], tmp_path: Path) -> None:
    study_file(tmp_path, STUDY.replace("budget = 40", "budget = 400"))
    done = interrupted_run(tmp_path)
    assert done.code == 130, done.err
    err = done.err
    assert "`bilevel study resume out` goes on" in err
    found = console("study", "status", "out", "--json", cwd=tmp_path).json
    assert found["state"] in ("interrupted", "idle")
    done = console("study", "resume", "out", "--json", "--quiet", cwd=tmp_path)
    assert (done.code, done.json["complete"]) == (0, 3)


def test_a_wider_study_learns_from_the_narrow_one(tmp_path: Path) -> None:
    narrow = STUDY.replace("width = 16", "width = { low = 8, high = 16, default = 12 }")
    run = ("study", "run", "small.toml", "--own", "*=sampler", "--quiet")
    study_file(tmp_path, narrow)
    assert console(*run, "--out", "a", cwd=tmp_path).code == 0
    study_file(tmp_path, narrow.replace("high = 16", "high = 32"))
    refused = console(*run, "--out", "a", cwd=tmp_path)
    assert refused.code == 4
    assert "width: high 16 -> 32" in refused.err
    assert "may learn from this one" in refused.err
    done = console(*run, "--out", "b", "--learn", "a", "--trials", 1, cwd=tmp_path)
    assert done.code == 0, done.err
    found, first = (StoredStudy(tmp_path / name) for name in ("b", "a"))
    assert [r.imported for r in found.trials] == [True] * 3 + [False]
    assert [r.value for r in found.trials[:3]] == [r.value for r in first.trials]
    # A table, too; one that does not fit leaves nothing behind.
    names = first.trials[0].params
    row = ",".join(map(str, names.values()))
    (tmp_path / "good.csv").write_text(f"{','.join(names)},loss\n{row},0.5\n")
    assert console(*run, "--out", "c", "--learn", "good.csv", "--trials", 1, cwd=tmp_path).code == 0
    (tmp_path / "bad.csv").write_text(f"{','.join(names)},loss\n{row},nan\n")
    for source, said in (("bad.csv", "row 0: expected a finite"), ("no.csv", "no.csv"),
                         ("nowhere", "there is no folder or database 'nowhere'")):  # fmt: skip
        wrong = console(*run, "--out", "d", "--learn", source, cwd=tmp_path)
        assert wrong.code == 2
        assert said in wrong.err
        assert not (tmp_path / "d" / "spec.json").exists()
