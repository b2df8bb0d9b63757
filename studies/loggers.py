"""TensorBoard and MLflow: callbacks of `tune`, and listeners of `Study.run(on_event=...)`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from bilevel.callbacks import Callback
from bilevel.run import Run
from studies.events import Event, Finished, Rung, Started
from studies.record import TrialRecord

__all__ = ["MLflow", "TensorBoard"]


def _scalars(run: Run) -> dict[str, float]:
    """The numbers of the last outer step, and scalar hyperparameters by name."""
    record = run.trace[-1]
    found = {k: float(v) for k, v in record.items() if isinstance(v, int | float)}
    values = {f"hparams/{n}": v for n, v in run.hparams.items()}
    found |= {n: float(v) if v.numel() == 1 else float(v.median()) for n, v in values.items()}
    return {name: number for name, number in found.items() if math.isfinite(number)}


def _plain(record: TrialRecord) -> dict[str, Any]:
    """Hyperparameters that a table of trials can show: numbers, options, medians."""
    found: dict[str, Any] = {}
    for name, value in (record.hparams or record.params).items():
        if isinstance(value, Mapping):
            found[f"{name}.median"] = value["median"]
        elif isinstance(value, list):
            found |= {f"{name}.{i}": part for i, part in enumerate(value) if not _nested(part)}
        else:
            found[name] = value
    return found


def _nested(value: Any) -> bool:
    return isinstance(value, list)


def _numbers(record: TrialRecord) -> dict[str, float]:
    own = {"value": record.value, "cost/equivalent_steps": float(record.cost.equivalent_steps)}
    found = {**{k: v for k, v in own.items() if v is not None}, **record.metrics}
    return {name: float(v) for name, v in found.items() if math.isfinite(v)}


class TensorBoard(Callback):
    """Writes what TensorBoard reads, by way of tensorboardX.

    As a callback of `tune`, every number of an outer step; as ``on_event`` of `Study.run`, a run
    for each trial, with its value at rungs and its hyperparameters at the end.

    Args:
        folder: for the event files; ``tensorboard --logdir FOLDER`` shows it.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        try:
            import tensorboardX
        except ImportError as error:
            raise ImportError(
                "TensorBoard needs tensorboardX: pip install tensorboardX."
            ) from error
        self._make = tensorboardX.SummaryWriter
        self._folder = Path(fspath(folder))
        self._writers: dict[str, Any] = {}

    def _writer(self, name: str) -> Any:
        if name not in self._writers:
            self._writers[name] = self._make(str(self._folder / name))
        return self._writers[name]

    def on_outer_step(self, run: Run) -> None:
        """Write the numbers of the outer step; see `Callback.on_outer_step`."""
        for name, number in _scalars(run).items():
            self._writer(".").add_scalar(name, number, run.outer_steps)

    def on_end(self, run: Run) -> None:
        """Close the file; see `Callback.on_end`."""
        self.close()

    def __call__(self, event: Event) -> None:
        """Write what happened in a study."""
        if isinstance(event, Rung):
            self._writer(f"trial-{event.number}").add_scalar("rung/value", event.value, event.rung)
        elif isinstance(event, Finished):
            name = f"trial-{event.record.number}"
            writer = self._writer(name)
            for key, number in _numbers(event.record).items():
                writer.add_scalar(f"end/{key}", number, event.record.cost.steps)
            plain = {k: v if isinstance(v, int | float) else str(v)
                     for k, v in _plain(event.record).items()}  # fmt: skip
            writer.add_hparams(plain, _numbers(event.record), name="hparams")
            writer.close()
            del self._writers[name]

    def close(self) -> None:
        """Close all files; those of finished trials are closed already."""
        while self._writers:
            self._writers.popitem()[1].close()


class MLflow(Callback):
    """Writes to an MLflow tracking store.

    As a callback of `tune`, one run with every number of an outer step; as ``on_event`` of
    `Study.run`, a run for each trial of the study, failed ones marked as failed.

    Args:
        experiment: name, made where there is none.
        uri: of the tracking store, such as ``sqlite:///mlflow.db``; default: MLflow's own.

    Raises:
        ImportError: MLflow is not installed.
    """

    def __init__(self, experiment: str = "bilevel", uri: str | None = None) -> None:
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise ImportError("MLflow needs mlflow: pip install mlflow-skinny.") from error
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        self._experiment = (
            self._client.create_experiment(experiment) if found is None else found.experiment_id
        )
        self._runs: dict[str, str] = {}

    def _run(self, name: str) -> str:
        if name not in self._runs:
            made = self._client.create_run(self._experiment, run_name=name)
            self._runs[name] = made.info.run_id
        return self._runs[name]

    def on_outer_step(self, run: Run) -> None:
        """Log the numbers of the outer step; see `Callback.on_outer_step`."""
        for name, number in _scalars(run).items():
            self._client.log_metric(self._run("tune"), name, number, step=run.outer_steps)

    def on_end(self, run: Run) -> None:
        """End the run; see `Callback.on_end`."""
        self._end("tune", "FINISHED")

    def __call__(self, event: Event) -> None:
        """Log what happened in a study."""
        if isinstance(event, Started):
            for key, value in event.params.items():
                if not event.resumed:
                    self._client.log_param(self._run(f"trial-{event.number}"), _key(key), value)
        elif isinstance(event, Rung):
            id_ = self._run(f"trial-{event.number}")
            self._client.log_metric(id_, "rung.value", event.value, step=event.rung)
        elif isinstance(event, Finished):
            record, name = event.record, f"trial-{event.record.number}"
            id_ = self._run(name)
            for key, number in _numbers(record).items():
                self._client.log_metric(id_, key, number, step=record.cost.steps)
            for key, value in _plain(record).items():
                self._client.log_param(id_, f"end.{_key(key)}", value)
            self._client.set_tag(id_, "state", record.state)
            if record.failure is not None:
                self._client.set_tag(id_, "failure", str(record.failure))
            self._end(name, "FAILED" if record.state == "failed" else "FINISHED")

    def _end(self, name: str, status: str) -> None:
        if name in self._runs:
            self._client.set_terminated(self._runs.pop(name), status=status)


def _key(name: str) -> str:
    """A name that MLflow takes: no brackets, ``@`` or ``=``."""
    return "".join(c if c.isalnum() or c in "_-./ " else "." for c in name)
