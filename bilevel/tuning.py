"""A tuning run step by step: what `tune` drives to its end, and a study from rung to rung."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optree
from torch import Tensor

from bilevel.algorithm import OuterAlgorithm
from bilevel.budget import Budget
from bilevel.callbacks import Callback
from bilevel.checkpoint import copy, load, save
from bilevel.describe import describe, differences
from bilevel.inner import Inner
from bilevel.result import Best, Result
from bilevel.rng import global_seed, rng_state, set_rng_state
from bilevel.run import Run
from bilevel.schedule import Schedule
from bilevel.space import Space

__all__ = ["Tuning"]


class Tuning:
    """A `Run` with what is stored of it and what comes out of it; see `tune` for the arguments.

        tuning = Tuning(inner, algorithm, budget, seed=0)
        while tuning.run.status is RunStatus.RUNNING:
            tuning.advance()
        result = tuning.result()

    Between two calls the global random generators are the caller's.

    Attributes:
        run: the run.
    """

    def __init__(
        self,
        inner: Inner,
        algorithm: OuterAlgorithm[Any],
        budget: Budget,
        *,
        evaluate_every: int | None = None,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 30.0,
        resume: str | os.PathLike[str] | Result | None = None,
        history: int = 64,
        seed: int | None = None,
    ) -> None:
        self._callbacks, self._seed = callbacks, seed
        self._again = {
            "subject": inner, "algorithm": algorithm, "evaluate_every": evaluate_every,
            "callbacks": callbacks, "checkpoint": checkpoint,
            "checkpoint_every": checkpoint_every, "history": history, "seed": seed,
        }  # fmt: skip
        self._settings = {"algorithm": describe(algorithm), "space": inner.space.to_json()}
        self._rng: dict[str, Any] | None = None
        self._inside = False
        with self.generators():
            self.run = Run(inner, algorithm, budget, evaluate_every, Schedule(limit=history))
            if resume is not None:
                saved = copy(resume.state) if isinstance(resume, Result) else load(resume)
                name = "a Result" if isinstance(resume, Result) else Path(resume).name
                self._restore(saved, str(name))

    def advance(self, watchers: Sequence[Callback] | None = None) -> bool:
        """Do the next outer step and show it to the callbacks, or to these watchers.

        Returns:
            Whether there was one; otherwise the run is finished, see `Run.advance`.
        """
        with self.generators():
            before = self.run.outer_steps
            self.run.advance()
            moved = self.run.outer_steps > before
            if moved:
                _notify(self.run, self._callbacks if watchers is None else watchers)
            return moved

    def stored(self) -> dict[str, Any]:
        """Return everything up to the last whole outer step, as plain data."""
        states = [[name, callback.state_dict()] for name, callback in _stateful(self._callbacks)]
        return {"settings": self._settings, "run": self.run.state_dict(), "callbacks": states}

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Go on from what `stored` returned, with the same settings.

        Raises:
            ValueError: it is of something else, or of a run with other settings.
        """
        with self.generators():
            self._restore(stored, "it")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `stored` as a checkpoint, atomically."""
        save(path, self.stored())

    def evaluate(
        self, split: str, hparams: Mapping[str, Tensor] | None = None
    ) -> dict[str, float] | None:
        """Return the metrics of a split, by default at the values the weights were trained with.

        None where the inner level says that it has no such split; a loss that is not finite is
        {"loss": nan}.
        """
        inner = self.run.inner
        coming = inner.hparams
        inner.set_hparams(self.run.hparams if hparams is None else hparams)
        try:
            with self.generators():
                return _evaluate(inner, split)
        finally:
            inner.set_hparams(coming)

    def result(self) -> Result:
        """Put the inner level at the returned weights, and look at the test split."""
        run, state = self.run, self.stored()
        inner, best = run.inner, run.best
        hparams = copy(run.hparams)
        if run.returns_best and best is not None:
            _adopt(inner, best.params)
            hparams = copy(best.hparams)
        inner.set_hparams(hparams)
        with self.generators():
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
            _again=self._again,
        )

    @contextmanager
    def generators(self) -> Iterator[None]:
        """Have this run's states of the global generators in place, then the caller's again."""
        if self._seed is None or self._inside:
            yield
            return
        with global_seed(self._seed):
            if self._rng is not None:
                set_rng_state(self._rng)
            self._inside = True
            try:
                yield
            finally:
                self._inside = False
                self._rng = rng_state()

    def _restore(self, saved: Any, name: str) -> None:
        if not isinstance(saved, dict) or set(saved) != {"settings", "run", "callbacks"}:
            raise ValueError(f"resume: {name!r} is not a checkpoint of tune().")
        old, new = saved["settings"], self._settings
        lines = differences(old["algorithm"], new["algorithm"], "algorithm")
        if old["space"] != new["space"]:
            before_, now_ = (Space.from_json(settings["space"]) for settings in (old, new))
            lines += [f"space: {line}" for line in before_.differences(now_)]
        before, now = [name for name, _ in saved["callbacks"]], _stateful(self._callbacks)
        if before != [name for name, _ in now]:
            lines.append(f"callbacks: {before} before, {[name for name, _ in now]} now")
        if lines:
            raise ValueError("resume: the stored run had other settings:\n  " + "\n  ".join(lines))
        self.run.load_state_dict(saved["run"])
        for (_, callback), (_, state) in zip(now, saved["callbacks"], strict=True):
            callback.load_state_dict(state)


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
