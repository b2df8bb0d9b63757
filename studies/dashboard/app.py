"""`bilevel study dashboard`: optuna-dashboard on this machine alone, with our figures and notes."""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from types import SimpleNamespace
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.trial import FrozenTrial

from studies.dashboard.guard import Guard
from studies.figures.charts import Curves
from studies.figures.interactive import interactive
from studies.figures.plots import figures
from studies.record import TrialRecord
from studies.storage.all_trials import all_trials
from studies.storage.overlay import Overlay
from studies.views.stored import StoredStudy
from studies.views.summary import done_line, summary
from studies.views.tables import value_text

__all__ = ["Dashboard", "DashboardError"]

REFRESH_SECONDS = 60.0
"""Wall time between two drawings of a study that is being run."""

CARD_HEIGHT = 450
"""Pixels that optuna-dashboard has for a figure."""

MOST_NOTES = 500
"""Trials that get a note of ours."""


class DashboardError(RuntimeError):
    """The server cannot be started; the message says why."""


@dataclass(frozen=True)
class Dashboard:
    """A running server.

    Attributes:
        url: address with the token.
        server: the server; `serve` runs it.
        stop: ends the drawing in the background, and the server.
    """

    url: str
    server: WSGIServer
    stop: Callable[[], None]

    @classmethod
    def of(cls, study: StoredStudy, port: int = 0, *, write: bool = False) -> Dashboard:
        """Start listening on 127.0.0.1.

        Figures and notes stay in this process: the study's database is not written to, so that
        a dashboard never waits for a running study, nor a study for it.  They are drawn again
        while somebody runs the study.

        Args:
            study: what is shown.
            port: of the server; 0 for any free one.
            write: whether the pages may change the study: notes, deletion, new studies.

        Raises:
            DashboardError: optuna-dashboard is missing, or the port is taken.
        """
        try:
            from optuna_dashboard import wsgi
        except ImportError as error:
            raise DashboardError(
                "the dashboard needs optuna-dashboard: pip install 'bilevel[dashboard]'."
            ) from error
        layer: dict[tuple[int, str], Any] = {}
        shown = Overlay(study.database, layer, keep=False)
        study.files.artifacts.mkdir(parents=True, exist_ok=True)
        application = wsgi(shown, artifact_store=FileSystemArtifactStore(study.files.artifacts))
        try:
            server = make_server("127.0.0.1", port, application, _Server, _Quiet)
        except (OSError, OverflowError) as error:
            raise DashboardError(f"port {port} cannot be used: {error}.") from error
        token = secrets.token_urlsafe(24)
        server.set_app(Guard(application, token, server.server_port, write))
        draw(study, layer)
        ended = threading.Event()
        threading.Thread(target=_keep_drawing, args=(study, layer, ended), daemon=True).start()

        def stop() -> None:
            ended.set()
            server.shutdown()
            server.server_close()

        page = f"/dashboard/studies/{study.optuna._study_id}"
        url = f"http://127.0.0.1:{server.server_port}{page}?token={token}"
        return cls(url, server, stop)


def draw(study: StoredStudy, layer: dict[tuple[int, str], Any]) -> None:
    """Put figures and notes of a study, as it is now, into a layer."""
    from optuna_dashboard import save_note, save_plotly_graph_object

    fresh: dict[tuple[int, str], Any] = {}
    kept = Overlay(study.database, fresh, keep=True)
    view = optuna.load_study(study_name=study.name, storage=kept)
    stored = study.database.get_study_system_attrs(view._study_id)
    for name, chart in figures(study).items():
        figure = interactive(chart).update_layout(height=CARD_HEIGHT)
        if isinstance(chart, Curves) and chart.rows > 1:
            figure.update_layout(showlegend=False)  # it would take the room of a column of planes
        save_plotly_graph_object(view, figure, graph_object_id=name)
    if "dashboard:note_ver" not in stored:
        save_note(view, study_note(study))
    for trial in all_trials(study.optuna)[:MOST_NOTES]:
        if f"dashboard:{trial._trial_id}:note_ver" not in stored:
            place = SimpleNamespace(storage=kept, study=view, _trial_id=trial._trial_id)
            save_note(place, trial_note(study, trial))
    layer.update(fresh)


def study_note(study: StoredStudy) -> str:
    """Return what a study is, and who owns what, as Markdown."""
    found = summary(study.optuna)
    lines = [
        f"**{study.learner_name}** on **{study.task_name}**: {done_line(found)}",
        "",
        "| hyperparameter | owner | range |",
        "| --- | --- | --- |",
    ]
    for name, domain in study.space.items():
        lines.append(f"| {name} | {study.space.owner(name)} | {_cell(repr(domain))} |")
    return "\n".join(lines)


def trial_note(study: StoredStudy, trial: FrozenTrial) -> str:
    """Return how a trial ended, and where each hyperparameter did, as Markdown."""
    record = TrialRecord.of(trial)
    lines = [f"**{record.state}**" + (f": {record.failure}" if record.failure else "")]
    if record.start is not None:
        lines.append(f"\nWarm start from trial {record.start}.")
    if record.at is not None:
        lines.append(
            f"\nBest after {record.at} of {record.cost.steps} training steps: values and weights "
            "are of then."
        )
    if record.hparams:
        lines += ["", "| hyperparameter | owner | value |", "| --- | --- | --- |"]
        for name, value in record.hparams.items():
            owner = study.owner(record, name)
            lines.append(f"| {name} | {owner} | {_cell(value_text(value))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _keep_drawing(
    study: StoredStudy, layer: dict[tuple[int, str], Any], ended: threading.Event
) -> None:
    """Draw again while somebody runs the study, and once more after that."""
    running = study.holder() is not None
    while not ended.wait(REFRESH_SECONDS):
        before, running = running, study.holder() is not None
        if running or before:
            draw(study, layer)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hung up is no error of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Quiet(WSGIRequestHandler):
    """No line for each request: addresses would put the token into logs."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
