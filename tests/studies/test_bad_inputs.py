"""Twenty bad inputs: each is refused before trial 0, or is a failure with a kind, in one sentence.

A full disk is no refusal: it is waited for, see `test_crashes.test_a_full_disk_is_waited_for`.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.storages import InMemoryStorage

from bilevel import Choice, Float, Grad, Int, Space
from studies import MismatchError, StorageError
from studies.views.stored import StoredStudy
from tests.studies.bad import (
    FINE,
    TOML,
    Case,
    Fails,
    FailsAtConsole,
    Refused,
    RefusedAtConsole,
    another_program,
    another_space,
    bad_journal,
    bilevel_run,
    database,
    file,
    in_space,
    notes,
    opened,
    other_storage,
    overwritten,
    ran,
    shop,
    within,
    without_a_trial,
)
from tests.studies.bad_rows import (
    artifacts_outside_are_not_read,
    scalars_are_converted,
    second_writer_is_refused,
    second_writer_is_refused_at_console,
    stops_at_a_failure_budget,
)

ROOT = Path(__file__).parents[2]
NAN, INF = math.nan, math.inf

optuna.logging.set_verbosity(optuna.logging.WARNING)

NO_NUMBER = r"TypeError: metric 'loss' must be a number, but got '0\.5' \(str\)\."
NOT_FINITE = r"val loss is {} at \d+% of the budget"
LUCK = "RuntimeError: out of luck"
POOL = {"executor": "pool"}

TABLE: dict[str, list[Case]] = {
    "1 NaN objective": [
        Fails("nan", "not finite", NOT_FINITE.format("nan")),
        Fails("nan", "not finite", NOT_FINITE.format("nan"), POOL),
        FailsAtConsole("nan", "not finite", NOT_FINITE.format("nan")),
    ],
    "2 infinite objective": [
        Fails("inf", "not finite", NOT_FINITE.format("inf")),
        FailsAtConsole("inf", "not finite", NOT_FINITE.format("inf")),
    ],
    "3 text returned": [
        Fails("text", "exception", NO_NUMBER),
        Fails("text", "exception", NO_NUMBER, POOL),
        FailsAtConsole("text", "exception", NO_NUMBER),
    ],
    "4 an exception": [
        Fails("raise", "exception", LUCK),
        Fails("raise", "exception", LUCK, POOL),
        FailsAtConsole("raise", "exception", LUCK),
        stops_at_a_failure_budget,
    ],
    "5 low above high, log of 0, no options": [
        Refused(within(lambda: Float(2.0, 1.0)), r"Float: low must be less than high.*low=2\.0 "),
        Refused(within(lambda: Int(2, 1)), "Int: low must be less than high.*low=2 and high=1"),
        Refused(within(lambda: Grad(1.5, 2.0, 1.0)), "Grad: low must be less than high.*low=2.0"),
        Refused(
            within(lambda: Float(0.0, 1.0, log=True)), "Float: low must be positive on a log.*"
        ),
        Refused(within(lambda: Int(0, 4, log=True)), "Int: low must be positive.*got low=0"),
        Refused(
            within(lambda: Grad(0.5, 0.0, 1.0, "log")), r"Grad: low must be positive.*low=0\.0"
        ),
        Refused(within(lambda: Choice()), "Choice: needs at least one option, but got none"),
        RefusedAtConsole(
            r"\[space\] x: Float: low must be less than high, .*low=2\.0 and high=1\.0",
            in_space("x = { low = 2.0, high = 1.0 }"),
        ),
        RefusedAtConsole(
            r"\[space\] x: Float: low must be positive on a log scale, but got low=0\.0",
            in_space("x = { low = 0.0, log = true }"),
        ),
        RefusedAtConsole(
            r"\[space\] how: Choice: needs at least one option, but got none",
            ('how = "fine"', "how = { values = [] }"),
        ),
    ],
    "6 NaN or infinite bound": [
        *(
            Refused(within(lambda a=low, b=high: Float(a, b)), f"Float: {said}")  # type: ignore[misc]
            for low, high, said in (
                (NAN, 1.0, "low must be finite, but got nan"),
                (0.0, NAN, "high must be finite, but got nan"),
                (-INF, 1.0, "low must be finite, but got -inf"),
                (0.0, INF, "high must be finite, but got inf"),
            )
        ),
        Refused(within(lambda: Grad(0.5, NAN, 1.0)), "Grad: low must be finite, but got nan"),
        Refused(
            within(lambda: Int(0, INF)),  # type: ignore[arg-type]
            r"Int: high must be an integer, but got inf \(float\)",
            TypeError,
        ),
        RefusedAtConsole(
            r"small\.toml: space\.x\.low must be finite, but got nan", in_space("x = { low = nan }")
        ),
        RefusedAtConsole(r"space\.x\.high must be finite, .* inf", in_space("x = { high = inf }")),
        RefusedAtConsole(
            r"run\.total\.seconds must be finite", ("[run]", "[run]\ntotal.seconds = inf")
        ),
    ],
    "7 the same name twice": [
        Refused(
            lambda f: opened(f, Space({"x": Float(0, 1)}, x=Float(0, 2))),
            "Space: names must be unique, but got 'x' twice",
        ),
        Refused(lambda f: opened(f, FINE | {"x": Float(0, 2)}), "'x' is in both spaces"),
        RefusedAtConsole(
            r"'small\.toml' is not TOML: .*line 8", in_space('how = "fine"\nmark = "none"')
        ),
        Refused(
            lambda f: opened(f, metric=["loss", "loss"]),
            r"metric: names must be unique, but got \['loss', 'loss'\]",
        ),
        RefusedAtConsole(
            r"metric: names must be unique, but got \['loss', 'loss'\]",
            ("learner", 'metric = ["loss", "loss"]\nlearner'),
        ),
        RefusedAtConsole(
            "--own must name 'x' once, but got x=fixed and x=sampler",
            args=("--own", "x=fixed", "--own", "x=sampler"),
        ),
        RefusedAtConsole(
            "budget: each limit must be given once, but got 'steps=3,steps=4'",
            args=("--budget", "steps=3,steps=4"),
        ),
    ],
    "8 other bounds on resume": [
        another_space(
            {"x": Float(-1.0, 2.0)}, r"space: x: high 1\.0 -> 2\.0; .*go on with the same"
        ),
        another_space(
            {"x": Float(-0.5, 1.0)}, r"space: x: low -1\.0 -> -0\.5; .*go on with the same"
        ),
        RefusedAtConsole(
            r"space: x: high 1\.0 -> 2\.0", in_space("x = { high = 2.0 }"), code=4, given=ran
        ),
    ],
    "9 log and options changed on resume": [
        another_space(
            {"x": Float(0.1, 1.0, log=True)},
            r"space: x: low -1\.0 -> 0\.1; .*space: x: log .* -> True",
        ),
        another_space({"mark": Choice("none", "third")}, "space: mark: .*'other'.* -> .*'third'"),
        RefusedAtConsole(
            r"space: x: low -1\.0 -> 0\.1; .*space: x: log .* -> True",
            in_space("x = { low = 0.1, log = true, default = 0.5 }"),
            code=4,
            given=ran,
        ),
        RefusedAtConsole(
            "space: mark: .*third",
            ('mark = "none"', 'mark = { values = ["none", "third"] }'),
            code=4,
            given=ran,
        ),
    ],
    "10 opposite direction on resume": [
        Refused(
            lambda f: opened(f, direction="maximize").run(2, 10),
            "direction: 'minimize' before, 'maximize' now",
            MismatchError,
            given=ran,
        ),
        RefusedAtConsole(
            "direction: 'minimize' before, 'maximize' now",
            ("learner", 'direction = "maximize"\nlearner'),
            code=4,
            given=ran,
        ),
    ],
    "11 tensor, array or set": [
        scalars_are_converted,
        Fails("array", "exception", r"TypeError: metric 'loss' must be a number, but got array.*"),
        Fails("tensor beside", "exception", r"TypeError: metric 'size' must be .*\(Tensor\)\."),
        Fails("set beside", "exception", r"TypeError: metric 'size' .* got \{0\.5\} \(set\)\."),
        FailsAtConsole("set beside", "exception", r"TypeError: metric 'size' must be a number.*"),
        Refused(
            lambda f: opened(f, constraints={"loss": {0.5}}),
            r"constraints\['loss'\] must be a number, but got \{0\.5\} \(set\)",
            TypeError,
        ),
        Refused(
            lambda f: opened(f).enqueue({"x": {0.5}}),
            r"x must be a number, but got \{0\.5\} \(set\)",
            TypeError,
        ),
        Refused(
            lambda f: opened(f).learn([{"x": np.array([0.5, 0.5]), "loss": 1.0}], "notes"),
            "notes, row 0: x must be a number, but got array",
        ),
        RefusedAtConsole(
            r"space\.x must be a text, a number, a list or a table, but got 2026-01-01 \(date\)",
            in_space("x = 2026-01-01"),
        ),
    ],
    "12 missing study, path for a URL": [
        Refused(lambda f: StoredStudy(f / "none.db"), "there is no folder or database '.*none.db'"),
        Refused(
            lambda f: StoredStudy(f / "out" / "study.db", "smal"),
            "study.db has no study 'smal'; did you mean 'small'",
            given=ran,
        ),
        Refused(
            lambda f: opened(f, storage=f),
            "is a folder; give the file, such as '.*study.db'",
            StorageError,
        ),
        other_storage("/proc/none/x.db", "storage '/proc/none/x.db': its folder .* does not exist"),
        other_storage("nosuch://x/y", "'nosuch://x/y' has the unknown scheme 'nosuch'; expected a"),
        other_storage(InMemoryStorage(), "storage is a InMemoryStorage; expected a path to a SQ"),
        other_storage("postgresql://me:p@ss@host/db", "storage has two @; .* as %40"),
        other_storage("postgresql://h/db?password=p", "storage has the option 'password'; write"),
        RefusedAtConsole("unknown scheme 'nosuch'; expected", args=("--storage", "nosuch://x/y")),
        RefusedAtConsole("'/proc/none' does not exist", args=("--storage", "/proc/none/x.db")),
        RefusedAtConsole("is a folder; give the file", args=("--storage", ROOT)),
        RefusedAtConsole(
            "'out' belongs to the study 'small' in study.db, but .*/other.db has none; give the ri",
            args=("--storage", "other.db"),
            given=lambda folder: bilevel_run(folder, TOML, "--trials", 1, "--quiet"),
        ),
    ],
    "13 journal: torn last line": bad_journal(lambda data: data[:-9]),
    "14 journal: blank line": bad_journal(lambda data: data + b"\n"),
    "15 journal: garbage": bad_journal(lambda data: b"\xff\xfe\x00\n" + data),
    "16 journal: a line is lost": bad_journal(without_a_trial),
    "17 torn or foreign SQLite file": [
        *file(notes, r"x\.db' is not a SQLite database; expected a SQLite database that"),
        *file(shop, r"x\.db' is a SQLite .* not one of Optuna: it has the tables \['customers'\]"),
        *file(another_program, "has trials, but was not made by bilevel; use another name", 4),
        *file(database(lambda data: data[:-1]), r"x\.db' is torn: \d+ of its \d+ bytes are left"),
        *file(database(lambda data: data[: len(data) // 2]), "is torn: .* restore it from a copy"),
        *file(database(overwritten), r"x\.db' is damaged: .*; restore it from a copy"),
    ],
    "18 a second writer": [second_writer_is_refused],
    "19 a second writer at the command line": [second_writer_is_refused_at_console],
    "20 artifact outside": [artifacts_outside_are_not_read],
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{row}, {i}")
        for row, cases in TABLE.items()
        for i, case in enumerate(cases, 1)
    ],
)
def test_bad_input(case: Case, tmp_path: Path) -> None:
    case(tmp_path)
