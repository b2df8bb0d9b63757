"""`bilevel study run --ray-address` on clusters that ``ray start`` made, and that go away."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
learner = "tests.studies.ray_hosts:Gated"
task = { name = "digits", n_train = 100 }
sampler = { name = "random" }
seed = 5

[space]
pace = 0.0

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


def wait_for_gate(out: Path, trials: int, ran: subprocess.Popen[str]) -> None:
    """Wait until so many trials at once stand at their gate, beyond the fourth rung."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if ran.poll() is not None:
            raise RuntimeError(f"the study has ended: {ran.communicate()}")
        try:
            records = StoredStudy(out).trials if out.exists() else []
        except StorageError:  # being made
            records = []
        at = [max(r.rungs, default=0) for r in records if r.state == "running"]
        if sum(rung >= 4 for rung in at) >= trials:
            return
        time.sleep(0.1)
    raise TimeoutError(f"no {trials} trials at the gate")


@contextmanager
def running_on_two_hosts(folder: Path) -> Iterator[tuple[Host, Host, subprocess.Popen[str]]]:
    """The study with one trial at its gate on each host, which has one CPU."""
    with two_hosts(folder, {"RAY_AUTH_TOKEN": new_token()}) as (first, second):
        first.start("--head", "--port=6379")
        second.start("--address=10.77.0.1:6379")
        run = ("study", "run", "walk.toml", "--out", "out", "--workers", "2")
        ran = first.bilevel(*run, "--ray-address", "10.77.0.1:6379")
        wait_for_gate(folder / "out", 2, ran)
        yield first, second, ran


def test_a_host_is_lost_and_no_trial_is(folder: Path) -> None:
    with running_on_two_hosts(folder) as (first, second, ran):
        second.kill()
        first.open_gate()
        _, said = ran.communicate(timeout=180)
    assert ran.returncode == 0, said
    assert said.count("worker died") == 1
    same(StoredStudy(folder / "out").trials, undisturbed(folder))


def test_the_daemon_of_the_own_host_is_lost(folder: Path) -> None:
    with running_on_two_hosts(folder) as (first, second, ran):
        first.kill_daemon("raylet")  # the head lives, and so does the other host
        _, said = ran.communicate(timeout=180)
        assert ran.returncode == 2, said
        assert len(said.splitlines()) == 1
        assert said.startswith("bilevel: ray: the daemon of Ray on this host (10.77.0.1:")
        records = StoredStudy(folder / "out").trials
        assert [(r.state, max(r.rungs)) for r in records] == [("running", 4)] * 2
        for host in (first, second):
            host.open_gate()
            host.kill()
        first.start("--head", "--port=6379")
        second.start("--address=10.77.0.1:6379")
        again = first.bilevel("study", "resume", "out", "--quiet")
        _, said = again.communicate(timeout=180)
    assert (again.returncode, said) == (0, "")
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
    host.open_gate()
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


@pytest.mark.parametrize(
    ("lost", "reason"), [("head", "no answer for 20 s; the"), ("all", "the trials")]
)
def test_a_study_outlives_its_cluster(lost: str, reason: str, head: tuple[Host, str]) -> None:
    host, address = head
    ran = host.bilevel("study", "run", "walk.toml", "--out", "out", "--ray-address", address)
    wait_for_gate(host.folder / "out", 1, ran)
    if lost == "head":
        host.kill_daemon("gcs_server")
    else:
        host.kill()
    _, said = ran.communicate(timeout=120)
    assert ran.returncode == 2, said
    assert said.splitlines()[-1].startswith("bilevel: ray: the cluster ")
    assert re.search(rf":{address.rpartition(':')[2]} is gone[:;] {reason}", said)
    (record,) = StoredStudy(host.folder / "out").trials
    assert record.state == "running"
    host.kill()
    host.open_gate()
    host.start("--head", f"--port={address.rpartition(':')[2]}")
    again = host.bilevel("study", "resume", "out", "--quiet")
    _, said = again.communicate(timeout=180)
    assert (again.returncode, said) == (0, "")
    same(StoredStudy(host.folder / "out").trials, undisturbed(host.folder))
