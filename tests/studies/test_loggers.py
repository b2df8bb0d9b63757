"""TensorBoard and MLflow: what is written, read back with the real libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from adapters import registry, tasks
from bilevel import Descent, tune
from hypergrad import Unrolled
from studies import Study
from studies.loggers import MLflow, TensorBoard

NETWORK = registry.get("network")
TASK = tasks.get("digits", noise=0.2, n_train=100)
SMALL = NETWORK.space.fix(width=16, depth=1)
ALGORITHM = Descent(Unrolled(steps=5), lr=0.1)


def small_study(folder: Path, listener: object) -> Study:
    study = Study("s", NETWORK, TASK, folder / "x.db", space=SMALL, algorithm=ALGORITHM)
    return study.run(2, 20, scheduler="fifo", rungs=2, on_event=listener)  # type: ignore[arg-type]


def small_run(callback: TensorBoard | MLflow) -> list[float]:
    learner = NETWORK(SMALL)
    learner.setup(TASK, SMALL.defaults(), seed=0)
    result = tune(learner, ALGORITHM, 20, callbacks=[callback])  # type: ignore[arg-type]
    return [float(row["grad_norm"] or 0.0) for row in result.trace]


def test_tensorboard(tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard, which reads the files back, is not installed",
    )

    def read(folder: Path) -> object:
        found = reader.EventAccumulator(str(folder))
        found.Reload()
        return found

    norms = small_run(TensorBoard(tmp_path / "run"))
    found = read(tmp_path / "run")
    written = [event.value for event in found.Scalars("grad_norm")]  # type: ignore[attr-defined]
    assert written == pytest.approx(norms, rel=1e-6)
    assert "hparams/robustness" in found.Tags()["scalars"]  # type: ignore[attr-defined]

    study = small_study(tmp_path, TensorBoard(tmp_path / "study"))
    for record in study.trials:
        found = read(tmp_path / "study" / f"trial-{record.number}")
        rungs = [event.value for event in found.Scalars("rung/value")]  # type: ignore[attr-defined]
        assert rungs == pytest.approx([record.rungs[i] for i in sorted(record.rungs)], rel=1e-6)
        (end,) = found.Scalars("end/value")  # type: ignore[attr-defined]
        assert end.value == pytest.approx(record.value, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    norms = small_run(MLflow("tuned", uri))
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tuned").experiment_id])
    history = client.get_metric_history(run.info.run_id, "grad_norm")
    assert [metric.value for metric in sorted(history, key=lambda m: m.step)] == norms
    assert run.info.status == "FINISHED"

    study = small_study(tmp_path, MLflow("studied", uri))
    runs = client.search_runs([client.get_experiment_by_name("studied").experiment_id])
    values = {run.info.run_name: run.data.metrics["value"] for run in runs}
    assert values == {f"trial-{r.number}": r.value for r in study.trials}
    assert all("lr" in run.data.params for run in runs)


@pytest.mark.parametrize(("module", "kind"), [("tensorboardX", TensorBoard), ("mlflow", MLflow)])
def test_a_missing_library_is_named(
    module: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install"):
        kind(tmp_path)
