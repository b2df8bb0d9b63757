"""`bilevel study run --ray-address` on clusters that ``ray start`` made, and that go away."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from studies.record import TrialRecord
from studies.storage.database import StorageError
from studies.views.stored import StoredStudy
from tests.studies.console import console
from tests.studies.ray_hosts import Host, free_port, new_token, two_hosts

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]

WALK = """
learner = "tests.studies.trials:Walker"
task = { name = "digits", n_train = 100 }
sampler = { name = "random" }
seed = 5

[space]
pace = 0.1

[run]
trials = 8
budget = 20
checkpoint_seconds = 0.0
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path and a study file: Ray puts sockets below it."""
    made = Path(tempfile.mkdtemp(prefix="bi-", dir="/tmp"))
    (made / "walk.toml").write_text(WALK)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def head(folder: Path) -> Iterator[tuple[Host, str]]:
    """A cluster of this host alone, with a token; and its address."""
    host, port = Host(folder, {"RAY_AUTH_TOKEN": new_token()}), free_port()
    try:
        host.start("--head", f"--port={port}")
        yield host, f"127.0.0.1:{port}"
    finally:
        host.kill()


def undisturbed(folder: Path) -> list[TrialRecord]:
    """The trials of the same study in this process."""
    done = console("study", "run", "walk.toml", "--out", "alone", "--quiet", cwd=folder)
    assert done.code == 0, done.err
    return StoredStudy(folder / "alone").trials


def same(found: list[TrialRecord], expected: list[TrialRecord]) -> None:
    """Neither lost nor doubled, and with the numbers of the undisturbed study."""
    assert [r.number for r in found] == list(range(8))
    assert {r.state for r in found} == {"complete"}
    for name in ("value", "params", "rungs", "seed"):
        assert [getattr(r, name) for r in found] == [getattr(r, name) for r in expected]


def wait_for_rung(out: Path, rung: int, trials: int) -> None:
    """Wait until so many trials at once run beyond a rung."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            records = StoredStudy(out).trials if out.exists() else []
        except StorageError:  # being made
            records = []
        at = [max(r.rungs, default=0) for r in records if r.state == "running"]
        if sum(number >= rung for number in at) >= trials:
            return
        time.sleep(0.1)
    raise TimeoutError(f"no {trials} trials at rung {rung}")


def test_a_host_is_lost_and_no_trial_is(folder: Path) -> None:
    with two_hosts(folder, {"RAY_AUTH_TOKEN": new_token()}) as (first, second):
        first.start("--head", "--port=6379")
        second.start("--address=10.77.0.1:6379")
        run = ("study", "run", "walk.toml", "--out", "out", "--workers", "2")
        ran = first.bilevel(*run, "--ray-address", "10.77.0.1:6379")
        wait_for_rung(folder / "out", 2, 2)  # one trial on each host, which has one CPU
        second.kill()
        _, said = ran.communicate(timeout=180)
    assert ran.returncode == 0, said
    assert said.count("worker died") == 1
    same(StoredStudy(folder / "out").trials, undisturbed(folder))


def test_hosts_without_a_token_are_refused(folder: Path) -> None:
    open_ = {"RAY_AUTH_MODE": "disabled"}
    with two_hosts(folder, open_) as (first, second):
        first.start("--head", "--port=6379")
        second.start("--address=10.77.0.1:6379")
        for ours in (open_, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": new_token()}):
            ran = first.bilevel(
                "study", "run", "walk.toml", "--out", "out", "--ray-address", "10.77.0.1:6379",
                **ours,
            )  # fmt: skip
            _, said = ran.communicate(timeout=120)
            assert ran.returncode == 2, said
            assert said.startswith("bilevel: ray: the cluster has 2 hosts and no authentication")


def test_who_is_not_let_in_is_told_why(head: tuple[Host, str]) -> None:
    host, address = head
    study = (host.folder / "walk.toml").read_text()
    actors = f'name = "RayActors", address = "{address}", resources = {{ GPU = 4 }}'
    wide = study.replace("[run]", f"[run]\nexecutor = {{ {actors} }}")
    (host.folder / "wide.toml").write_text(wide)
    nobody = f"127.0.0.1:{free_port()}"
    cases: list[tuple[tuple[str, ...], dict[str, str], str]] = [
        (("walk.toml", "--ray-address", nobody), {}, "is not reached: connection refused."),
        (("walk.toml", "--ray-address", "nowhere"), {}, "Invalid address format"),
        (
            ("walk.toml", "--ray-address", address),
            {"RAY_AUTH_TOKEN": "", "HOME": str(host.folder)},
            "this process has no token; set RAY_AUTH_MODE=token and give",
        ),
        (
            ("walk.toml", "--ray-address", address),
            {"RAY_AUTH_TOKEN": new_token()},
            "refuses the token of this process; set RAY_AUTH_MODE=token and give",
        ),
        (
            ("walk.toml", "--ray-address", address),
            {"RAY_AUTH_MODE": "disabled"},
            "refuses the token of this process; set RAY_AUTH_MODE=token and give",
        ),
        (("wide.toml",), {}, "no node has {'GPU': 4}; the most a node has is {'GPU': 0.0}."),
    ]
    for number, (args, environment, expected) in enumerate(cases):
        ran = host.bilevel("study", "run", *args, "--out", f"out{number}", **environment)
        _, said = ran.communicate(timeout=120)
        assert ran.returncode == 2, said
        assert len(said.splitlines()) == 1
        assert said.startswith("bilevel: ")
        assert expected in said
    again = host.bilevel(
        "study", "resume", "out3", "--ray-address", address, "--quiet", "--trials", "1"
    )
    assert again.communicate(timeout=120)[1] == ""
    assert again.returncode == 0


def test_a_study_outlives_its_cluster(head: tuple[Host, str]) -> None:
    host, address = head
    ran = host.bilevel("study", "run", "walk.toml", "--out", "out", "--ray-address", address)
    wait_for_rung(host.folder / "out", 3, 1)
    host.kill()
    _, said = ran.communicate(timeout=120)
    assert ran.returncode == 2, said
    assert said.splitlines()[-1].startswith("bilevel: ray: the cluster ")
    assert f":{address.rpartition(':')[2]} is gone: no answer for 20 s;" in said
    (record,) = StoredStudy(host.folder / "out").trials
    assert record.state == "running"
    host.start("--head", f"--port={address.rpartition(':')[2]}")
    again = host.bilevel("study", "resume", "out", "--quiet")
    _, said = again.communicate(timeout=180)
    assert (again.returncode, said) == (0, "")
    same(StoredStudy(host.folder / "out").trials, undisturbed(host.folder))
