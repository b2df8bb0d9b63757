"""`tune`: run an outer algorithm on an inner level until the budget is spent."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optree
from torch import Tensor

from bilevel.algorithm import OuterAlgorithm
from bilevel.budget import Budget
from bilevel.callbacks import Callback, Progress
from bilevel.checkpoint import check_writable, copy, load, save
from bilevel.describe import describe, differences
from bilevel.inner import Inner
from bilevel.metrics import RunStatus
from bilevel.problem_inner import ProblemInner
from bilevel.result import Best, Result
from bilevel.rng import global_seed
from bilevel.run import Run
from bilevel.schedule import Schedule
from bilevel.space import Space
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
    watchers = [*callbacks, *([Progress()] if progress else [])]
    with global_seed(seed):
        run = Run(inner, algorithm, budget, evaluate_every, Schedule(limit=history))
        settings = {"algorithm": describe(algorithm), "space": inner.space.to_json()}
        if resume is not None:
            _restore(run, callbacks, settings, resume)

        def stored() -> dict[str, Any]:
            states = [[name, callback.state_dict()] for name, callback in _stateful(callbacks)]
            return {"settings": settings, "run": run.state_dict(), "callbacks": states}

        _drive(run, watchers, stored, checkpoint, checkpoint_every)
        state = stored()
        return _result(run, state, {
            "subject": inner, "algorithm": algorithm, "evaluate_every": evaluate_every,
            "callbacks": callbacks, "checkpoint": checkpoint,
            "checkpoint_every": checkpoint_every, "history": history, "seed": seed,
        })  # fmt: skip


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
    run: Run,
    watchers: Sequence[Callback],
    stored: Callable[[], dict[str, Any]],
    checkpoint: str | os.PathLike[str] | None,
    every: float,
) -> None:
    """Take outer steps until the run is finished."""
    with ExitStack() as ending:
        for watcher in watchers:
            ending.callback(watcher.on_end, run)
        if checkpoint is not None:
            ending.callback(lambda: save(checkpoint, stored()))
        try:
            for watcher in watchers:
                watcher.on_start(run)
            written = time.monotonic()
            while run.status is RunStatus.RUNNING:
                before = run.outer_steps
                run.advance()
                if run.outer_steps > before:
                    _notify(run, watchers)
                    if checkpoint is not None and time.monotonic() - written >= every:
                        save(checkpoint, stored())
                        written = time.monotonic()
        except KeyboardInterrupt:
            if run.status is RunStatus.RUNNING:
                run.stop(RunStatus.INTERRUPTED, "interrupted")
            raise


def _notify(run: Run, watchers: Sequence[Callback]) -> None:
    """Show the outer step to all watchers; an interrupt waits until each has seen it."""
    interrupt: KeyboardInterrupt | None = None
    for watcher in watchers:
        try:
            watcher.on_outer_step(run)
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _stateful(callbacks: Sequence[Callback]) -> list[tuple[str, Callback]]:
    """Return the callbacks that keep a state, with the names of their classes."""
    keeps = [c for c in callbacks if type(c).state_dict is not Callback.state_dict]
    return [(type(c).__qualname__, c) for c in keeps]


def _restore(
    run: Run, callbacks: Sequence[Callback], settings: dict[str, Any], resume: Any
) -> None:
    saved = copy(resume.state) if isinstance(resume, Result) else load(resume)
    if not isinstance(saved, dict) or set(saved) != {"settings", "run", "callbacks"}:
        raise ValueError(f"resume: {Path(resume).name!r} is not a checkpoint of tune().")
    lines = differences(saved["settings"]["algorithm"], settings["algorithm"], "algorithm")
    if saved["settings"]["space"] != settings["space"]:
        old, new = (Space.from_json(s["space"]) for s in (saved["settings"], settings))
        lines += [f"space: {line}" for line in old.differences(new)]
    before, now = [name for name, _ in saved["callbacks"]], _stateful(callbacks)
    if before != [name for name, _ in now]:
        lines.append(f"callbacks: {before} before, {[name for name, _ in now]} now")
    if lines:
        raise ValueError("resume: the stored run had other settings:\n  " + "\n  ".join(lines))
    run.load_state_dict(saved["run"])
    for (_, callback), (_, state) in zip(now, saved["callbacks"], strict=True):
        callback.load_state_dict(state)


def _result(run: Run, state: dict[str, Any], again: dict[str, Any]) -> Result:
    """Put the inner level at the returned weights, and look at the test split."""
    inner, best = run.inner, run.best
    hparams = copy(run.hparams)
    if run.returns_best and best is not None:
        _adopt(inner, best.params)
        hparams = copy(best.hparams)
    inner.set_hparams(hparams)
    val, test = (_evaluate(inner, split) for split in ("val", "test"))
    params = optree.tree_map(
        lambda t: t.detach().clone().requires_grad_(t.requires_grad), inner.params
    )
    return Result(
        params=params,
        hparams=hparams,
        space=inner.space,
        schedule=run.schedule,
        trace=run.trace,
        status=run.status,
        reason=run.reason,
        cost=run.cost,
        best=None if best is None else Best(best.outer_step, best.steps, best.loss),
        val=val,
        test=test,
        state=state,
        _again=again,
    )


def _evaluate(inner: Inner, split: str) -> dict[str, float] | None:
    """Return the metrics of a split; None where the inner level says that it has no such split."""
    if split not in getattr(inner, "splits", (split,)):
        return None
    try:
        return dict(inner.evaluate(split))
    except FloatingPointError:  # a loss that is not finite at the last weights is a finding, too
        return {"loss": math.nan}


def _adopt(inner: Inner, leaves: Sequence[Tensor]) -> None:
    now, spec = optree.tree_flatten(inner.params)
    marked = [
        leaf.detach().clone().requires_grad_(like.requires_grad)
        for leaf, like in zip(leaves, now, strict=True)
    ]
    inner.adopt(optree.tree_unflatten(spec, marked), inner.optimizer_state, steps=0)
