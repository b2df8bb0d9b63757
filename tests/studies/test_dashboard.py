"""The dashboard: who is let in, what is changed by whom, and what a real browser shows."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from optuna.trial import create_trial

from studies.record import TrialRecord
from studies.storage.locks import coordinator_lock
from studies.views.stored import StoredStudy
from tests.studies.console import console, five_trials

pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")

from studies.dashboard.app import Dashboard, DashboardError, trial_note

TITLES = {
    "values": "Value against cost by owner",
    "importance": "Importance of both owners",
    "hypergradient_norms": "Hypergradient norm per outer step",
    "paths": "Paths of gradient-owned values",
    "schedule": "Schedule of the best trial",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of five trials."""
    return five_trials(tmp_path_factory.mktemp("study"))


@dataclass
class Client:
    """A browser without its good manners."""

    served: Dashboard
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return int(self.served.server.server_port)

    @property
    def token(self) -> str:
        return urlsplit(self.served.url).query.removeprefix("token=")

    def ask(
        self,
        path: str = "/api/studies",
        method: str = "GET",
        body: str | None = None,
        **headers: str,
    ) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {**self.headers, **given})
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
        connection.close()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, text

    def enter(self) -> Client:
        status, headers, _ = self.ask(f"/dashboard?token={self.token}&x=1")
        assert status == 303
        assert headers["location"] == "/dashboard?x=1"
        assert "HttpOnly" in headers["set-cookie"]
        assert "SameSite=Lax" in headers["set-cookie"]
        return Client(self.served, {"Cookie": headers["set-cookie"].split(";")[0]})


def serve(folder: Path, **options: bool) -> Iterator[Client]:
    served = Dashboard.of(StoredStudy(folder), **options)
    thread = threading.Thread(target=served.server.serve_forever)
    thread.start()
    yield Client(served)
    served.stop()
    thread.join()


@pytest.fixture(scope="module")
def reading(made: Path) -> Iterator[Client]:
    yield from serve(made)


@pytest.fixture
def writing(made: Path, tmp_path: Path) -> Iterator[Client]:
    yield from serve(Path(shutil.copytree(made, tmp_path / "out")), write=True)


def test_only_this_machine_can_connect(reading: Client) -> None:
    assert reading.served.server.server_address[0] == "127.0.0.1"


def test_no_token_wrong_token_and_foreign_host(reading: Client) -> None:
    assert reading.ask()[0] == 401
    assert reading.ask(f"/api/studies?token={reading.token[:-1]}")[0] == 401
    assert reading.ask(Cookie=f"bilevel-{reading.port}=guess")[0] == 401
    inside = reading.enter()
    assert inside.ask()[0] == 200
    for host in ("evil.example", f"evil.example:{reading.port}", "127.0.0.1:1", ""):
        assert inside.ask(Host=host)[0] == 421
    assert inside.ask(Host=f"localhost:{reading.port}")[0] == 200


def test_reading_only(reading: Client) -> None:
    inside = reading.enter()
    (study,) = json.loads(inside.ask()[2])["study_summaries"]
    own = f"http://127.0.0.1:{reading.port}"
    for method, path in (
        ("DELETE", f"/api/studies/{study['study_id']}"),
        ("POST", "/api/studies"),
        ("PUT", f"/api/studies/{study['study_id']}/note"),
        ("PATCH", "/api/studies"),
    ):
        assert inside.ask(path, method, "{}", Origin=own)[0] == 403
    assert inside.ask()[0] == 200


def test_no_other_site_may_read_an_artifact(reading: Client, made: Path) -> None:
    study = StoredStudy(made)
    artifact = study.artifacts(0)["schedule.csv"]
    path = f"/artifacts/{study.optuna._study_id}/{study.trial(0)._trial_id}/{artifact}"
    status, headers, text = reading.enter().ask(path, Origin="http://evil.example")
    assert status == 200
    assert text.startswith("step,")
    assert not any(name.startswith("access-control-") for name in headers)
    assert headers["content-security-policy"] == "sandbox"
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_writing_needs_the_origin_of_the_server(writing: Client) -> None:
    inside, body = writing.enter(), json.dumps({"study_name": "new", "directions": ["minimize"]})
    kind = {"Content_Type": "application/json"}
    for headers in ({}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        assert inside.ask("/api/studies", "POST", body, **kind, **headers)[0] == 403
    own = f"http://127.0.0.1:{writing.port}"
    assert inside.ask("/api/studies", "POST", body, **kind, Origin=own)[0] == 201
    assert len(json.loads(inside.ask()[2])["study_summaries"]) == 2


def test_figures_and_notes_without_a_word_in_the_database(reading: Client, made: Path) -> None:
    study = StoredStudy(made)
    detail = json.loads(reading.enter().ask(f"/api/studies/{study.optuna._study_id}")[2])
    assert {graph["id"] for graph in detail["plotly_graph_objects"]} == set(TITLES)
    assert "robustness | grad" in detail["note"]["body"]
    heads = "| hyperparameter | owner | value |"
    assert all(heads in trial["note"]["body"] for trial in detail["trials"])
    attributes = study.database.get_study_system_attrs(study.optuna._study_id)
    assert not any(key.startswith("dashboard:") for key in attributes)


def test_a_note_says_when_a_trial_was_best(made: Path) -> None:
    study = StoredStudy(made)
    stored = study.trial(0)
    for at, said in ((30, True), (None, False)):
        record = replace(TrialRecord.of(stored), at=at)
        trial = create_trial(value=record.value, user_attrs=record.attributes())
        note = trial_note(study, trial)
        assert ("Best after 30 of 40 training steps" in note) == said


def test_a_running_study_can_be_shown(made: Path) -> None:
    study = StoredStudy(made)
    with coordinator_lock(study.files.study, study.name, study.database):
        for client in serve(made):
            assert client.enter().ask()[0] == 200


def test_port_in_use_is_one_sentence(made: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DashboardError, match=f"port {port} cannot be used"):
            Dashboard.of(StoredStudy(made), port)
        done = console("study", "dashboard", made, "--port", port, cwd=made)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1


def test_a_browser_shows_the_figures(reading: Client, tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("there is no chromium on this machine")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,3600",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
            "--dump-dom", reading.served.url,
        ],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    for title in TITLES.values():
        assert title in done.stdout, done.stderr[-2000:]
