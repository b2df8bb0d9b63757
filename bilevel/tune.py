"""`tune`: run an outer algorithm on an inner level until the budget is spent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optree
from torch import Tensor

from bilevel.algorithm import OuterAlgorithm
from bilevel.budget import Budget
from bilevel.callbacks import Callback, Progress
from bilevel.checkpoint import check_writable, copy, load, save
from bilevel.descent import Descent
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
    algorithm: OuterAlgorithm[Any] | None = None,
    budget: Budget | int = 1000,
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
    checkpoint_every: int = 10,
    resume: str | os.PathLike[str] | Result | None = None,
    history: int = 64,
    seed: int | None = None,
    progress: bool = False,
) -> Result:
    """Tune the gradient-owned hyperparameters of a training run while it trains.

    Args:
        subject: a learner that was set up (or any `Inner`), or a bare `hypergrad.Problem`.
        algorithm: how the hyperparameters move; `Descent()` if None.
        budget: of the run; a bare integer means training steps.
        params: initial weights of a bare problem; leaves that require grad are trained.
        space: hyperparameters of a bare problem, all owned by the gradient.
        hparams: initial values by name; without a space, a tree of tensors without bounds.
        optimizer: update rule of a bare problem, such as `hypergrad.SGD(lr=0.1)`; may be left out
            where the estimator brings one.
        inner_batch: batch of the inner loss, or a callable t -> batch.
        outer_batch: batch of the outer loss, or a callable t -> batch.
        val_batch: all validation data of a bare problem; `outer_batch` where that is no callable.
        test_batch: test data of a bare problem; only evaluated after the end.
        evaluate_every: outer steps between two evaluations on the whole validation split.
        callbacks: see `bilevel.callbacks`.
        checkpoint: file that the run is stored in, atomically, every `checkpoint_every` outer
            steps, at the end, and on Ctrl-C.
        checkpoint_every: see `checkpoint`.
        resume: a checkpoint file or a `Result` to go on from.
        history: tensors with more elements are kept in the schedule as quantiles.
        seed: of torch's, numpy's and Python's global generators inside this call; they are put
            back afterwards.  A learner has its own seed.
        progress: show a progress bar on standard error.

    Returns:
        The result.  A run that diverged has status DIVERGED and its last good weights.

    Raises:
        TypeError: a subject that is neither.
        ValueError: an argument that does not fit; a loss that does not depend on a
            hyperparameter (names it); another space or algorithm than the resumed run's.
        OSError: the checkpoint cannot be written; raised before any training.
        KeyboardInterrupt: on Ctrl-C, after the last whole outer step was stored.
    """
    algorithm = Descent() if algorithm is None else algorithm
    budget = Budget.of(budget)
    for name, count in (("evaluate_every", evaluate_every), ("checkpoint_every", checkpoint_every)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, but got {count!r}.")
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
            states = [callback.state_dict() for callback in callbacks]
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
    run: Run, watchers: Sequence[Callback], stored: Any, checkpoint: Any, every: int
) -> None:
    """Take outer steps until the run is finished."""
    for watcher in watchers:
        watcher.on_start(run)
    try:
        while run.status is RunStatus.RUNNING:
            before = run.outer_steps
            run.advance()
            if run.outer_steps > before:
                for watcher in watchers:
                    watcher.on_outer_step(run)
                if checkpoint is not None and run.outer_steps % every == 0:
                    save(checkpoint, stored())
    except KeyboardInterrupt:
        run.status, run.reason = RunStatus.INTERRUPTED, "interrupted"
        raise
    finally:
        if checkpoint is not None:
            save(checkpoint, stored())
        for watcher in watchers:
            watcher.on_end(run)


def _restore(
    run: Run, callbacks: Sequence[Callback], settings: dict[str, Any], resume: Any
) -> None:
    saved = copy(resume.state) if isinstance(resume, Result) else load(resume)
    if not isinstance(saved, dict) or set(saved) != {"settings", "run", "callbacks"}:
        raise ValueError(f"resume: {Path(resume).name!r} is not a checkpoint of tune().")
    lines = differences(saved["settings"]["algorithm"], settings["algorithm"], "algorithm")
    if saved["settings"]["space"] != settings["space"]:
        before, now = (Space.from_json(s["space"]) for s in (saved["settings"], settings))
        lines += [f"space: {line}" for line in before.differences(now)]
    if lines:
        raise ValueError("resume: the stored run had other settings:\n  " + "\n  ".join(lines))
    if len(saved["callbacks"]) != len(callbacks):
        raise ValueError(
            f"resume: the stored run had {len(saved['callbacks'])} callbacks, but now there are "
            f"{len(callbacks)}."
        )
    run.load_state_dict(saved["run"])
    for callback, state in zip(callbacks, saved["callbacks"], strict=True):
        callback.load_state_dict(state)


def _result(run: Run, state: dict[str, Any], again: dict[str, Any]) -> Result:
    """Put the inner level at the returned weights, and look at the test split."""
    inner, best = run.inner, run.best
    hparams = copy(run.hparams)
    if run.returns_best and best is not None:
        _adopt(inner, best.params)
        hparams = copy(best.hparams)
    inner.set_hparams(hparams)
    splits = inner.splits if isinstance(inner, ProblemInner) else ("val", "test")
    val, test = (dict(inner.evaluate(s)) if s in splits else None for s in ("val", "test"))
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


def _adopt(inner: Inner, leaves: Sequence[Tensor]) -> None:
    now, spec = optree.tree_flatten(inner.params)
    marked = [
        leaf.detach().clone().requires_grad_(like.requires_grad)
        for leaf, like in zip(leaves, now, strict=True)
    ]
    inner.adopt(optree.tree_unflatten(spec, marked), inner.optimizer_state, steps=0)
