"""`tune`: run an outer algorithm on an inner level until the budget is spent."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from bilevel.algorithm import OuterAlgorithm
from bilevel.budget import Budget
from bilevel.callbacks import Callback, Progress
from bilevel.checkpoint import check_writable
from bilevel.inner import Inner
from bilevel.metrics import RunStatus
from bilevel.problem_inner import ProblemInner
from bilevel.result import Result
from bilevel.space import Space
from bilevel.tuning import Tuning
from hypergrad import Problem
from hypergrad.optimizers import as_optimizer
from hypergrad.tree import Tree

__all__ = ["tune"]


def tune(
    subject: Inner | Problem,
    algorithm: OuterAlgorithm[Any],
    budget: Budget | int,
    *,
    params: Tree | None = None,
    space: Space | None = None,
    hparams: Tree | None = None,
    optimizer: Any = None,
    inner_batch: Any = None,
    outer_batch: Any = None,
    val_batch: Any = None,
    test_batch: Any = None,
    evaluate_every: int | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 30.0,
    resume: str | os.PathLike[str] | Result | None = None,
    history: int = 64,
    seed: int | None = None,
    progress: bool = False,
) -> Result:
    """Tune the gradient-owned hyperparameters of a training run while it trains.

    Args:
        subject: a learner that was set up (or any `Inner`), or a bare `hypergrad.Problem`.
        algorithm: how the hyperparameters move, such as `Descent()`.
        budget: of the run; a bare integer means training steps.
        params: initial weights of a bare problem; leaves that require grad are trained.
        space: hyperparameters of a bare problem, all owned by the gradient.
        hparams: initial values by name; without a space, a tree of tensors without bounds.
        optimizer: update rule of a bare problem, such as `hypergrad.SGD(lr=0.1)`; may be left out
            where the algorithm's estimator brings one.
        inner_batch: batch of the inner loss, or a callable t -> batch.
        outer_batch: batch of the outer loss, or a callable t -> batch.
        val_batch: all validation data of a bare problem; `outer_batch` where that is no callable.
        test_batch: test data of a bare problem; only evaluated after the end.
        evaluate_every: outer steps between two evaluations on the whole validation split, which
            the best weights and early stopping need; None for none before the end.
        callbacks: watch the run and may stop it, such as `EarlyStopping`.
        checkpoint: file that the run is stored in, atomically, after an outer step and whenever
            the call ends: at its end, on Ctrl-C and on an error.
        checkpoint_every: least seconds between two writes; 0 to write after every outer step.
            The numbers of a resumed run do not depend on it.
        resume: a checkpoint file or a `Result` to go on from.  Pass all other arguments as they
            were; the budget, still a total, may be larger.
        history: tensors with more elements are kept in the schedule as quantiles.
        seed: of torch's, numpy's and Python's global generators inside this call; they are put
            back afterwards.  A learner has its own seed.
        progress: show a progress bar on standard error.

    Returns:
        The result; an inner level that was passed in is left at the same weights and values.
        A run that diverged has status DIVERGED and its last good weights.

    Raises:
        TypeError: a subject that is neither; no outer algorithm; a loss that is no scalar.
        ValueError: an argument that does not fit; a loss that does not depend on a
            hyperparameter (names it); another space or algorithm than the resumed run's.
        OSError: the checkpoint cannot be written; raised before any training.
        KeyboardInterrupt: on Ctrl-C, after the last whole outer step was stored in `checkpoint`.
    """
    if not isinstance(algorithm, OuterAlgorithm):
        raise TypeError(
            "algorithm must be an outer algorithm, such as Descent(Implicit()), but got "
            f"{algorithm!r}."
        )
    budget = Budget.of(budget)
    if evaluate_every is not None and evaluate_every < 1:
        raise ValueError(f"evaluate_every must be at least 1, but got {evaluate_every!r}.")
    if not checkpoint_every >= 0:
        raise ValueError(f"checkpoint_every must be at least 0 s, but got {checkpoint_every!r}.")
    given = {
        "params": params, "space": space, "hparams": hparams, "optimizer": optimizer,
        "inner_batch": inner_batch, "outer_batch": outer_batch,
        "val_batch": val_batch, "test_batch": test_batch,
    }  # fmt: skip
    inner = _inner(subject, algorithm, given)
    if checkpoint is not None:
        check_writable(checkpoint, "checkpoint")
    tuning = Tuning(
        inner,
        algorithm,
        budget,
        evaluate_every=evaluate_every,
        callbacks=callbacks,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        history=history,
        seed=seed,
    )
    with tuning.generators():
        watchers = [*callbacks, *([Progress()] if progress else [])]
        _drive(tuning, watchers, checkpoint, checkpoint_every)
        return tuning.result()


def _inner(subject: Any, algorithm: Any, given: dict[str, Any]) -> Inner:
    """Return the inner level, made of a bare problem where that was given."""
    if isinstance(subject, Problem):
        if given["params"] is None:
            raise ValueError("params: a bare Problem needs initial weights.")
        rule = given.pop("optimizer")
        if rule is None:
            rule = getattr(getattr(algorithm, "estimator", None), "optimizer", None)
        if rule is None:
            raise ValueError(
                "optimizer: a bare Problem needs an update rule, such as hypergrad.SGD(lr=0.1)."
            )
        return ProblemInner(subject, given.pop("params"), optimizer=as_optimizer(rule), **given)
    if not isinstance(subject, Inner):
        raise TypeError(
            "subject must be a learner that was set up, or a hypergrad.Problem, but got "
            f"{type(subject).__name__}."
        )
    extra = [name for name, value in given.items() if value is not None]
    if extra:
        raise ValueError(f"{extra[0]} belongs to a bare Problem; a learner has its own.")
    return subject


def _drive(
    tuning: Tuning,
    watchers: Sequence[Callback],
    checkpoint: str | os.PathLike[str] | None,
    every: float,
) -> None:
    """Take outer steps until the run is finished."""
    run = tuning.run
    with ExitStack() as ending:
        for watcher in watchers:
            ending.callback(watcher.on_end, run)
        if checkpoint is not None:
            ending.callback(tuning.save, checkpoint)
        try:
            for watcher in watchers:
                watcher.on_start(run)
            written = time.monotonic()
            while run.status is RunStatus.RUNNING:
                moved = tuning.advance(watchers)
                if moved and checkpoint is not None and time.monotonic() - written >= every:
                    tuning.save(checkpoint)
                    written = time.monotonic()
        except KeyboardInterrupt:
            if run.status is RunStatus.RUNNING:
                run.stop(RunStatus.INTERRUPTED, "interrupted")
            raise
