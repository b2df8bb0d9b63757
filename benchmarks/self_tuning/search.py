"""Self-tuning against searches at equal total training steps, and its schedule against its end.

A problem is a factory of inner levels: ``make(hparams, seed) -> ModuleInner``.  Self-tuning runs
for N steps, and a search has `SHARE` · N steps in all: what a run of Δ-STN costs in plain steps.
Each run is evaluated 20 times, and its result is the evaluation with the lowest validation loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna

from benchmarks.self_tuning.report import mean, table
from bilevel import Callback, ModuleInner, SelfTuning, Space, tune
from bilevel.checkpoint import copy
from bilevel.inner import Inner

SHARE, LOOKS = 3, 20

Make = Callable[[Mapping[str, Any], int], ModuleInner]
Pair = tuple[float, float]
"""Validation and test loss."""


@dataclass
class Curve(Callback):
    """Validation and test loss during a run."""

    every: int
    points: list[tuple[int, float, float]] = field(default_factory=list)
    _seen: int = 0

    def look(self, inner: Any, steps: int) -> None:
        if steps // self.every > self._seen:
            self._seen = steps // self.every
            losses = inner.evaluate("val")["loss"], inner.evaluate("test")["loss"]
            self.points.append((steps, *losses))

    def on_outer_step(self, run: Any) -> None:
        self.look(run.inner, run.cost.steps)

    @property
    def best(self) -> Pair:
        return min((val, test) for _, val, test in self.points)


def trained(inner: ModuleInner, steps: int) -> Pair:
    """Plain training at fixed values."""
    curve = Curve(max(1, steps // LOOKS))
    for step in range(1, steps + 1):
        inner.step()
        curve.look(inner, step)
    return curve.best


def self_tuned(
    make: Make, algorithm: SelfTuning, start: Mapping[str, Any], steps: int, seed: int
) -> tuple[Pair, Any]:
    curve = Curve(max(1, steps // LOOKS))
    result = tune(make(start, seed), algorithm, steps, callbacks=[curve], history=100)
    return curve.best, result


def replayed(make: Make, result: Any, start: Mapping[str, Any], steps: int, seed: int) -> Pair:
    """A fresh network on a recorded schedule."""
    inner, curve = make(start, seed + 1000), Curve(max(1, steps // LOOKS))
    for step, _ in enumerate(result.schedule.replay(inner, steps), 1):
        curve.look(inner, step)
    return curve.best


def sampled(make: Make, space: Space, sampler: Any, trials: int, each: int, seed: int) -> Pair:
    """Random search or TPE: `trials` plain trainings; the first one at the defaults."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler)
    every = space.own(**dict.fromkeys(space, "sampler"))
    study.enqueue_trial(every.to_params({}))
    found: list[Pair] = []
    for _ in range(trials):
        trial = study.ask(every.to_optuna())
        found.append(trained(make(_inside(space, every.suggest(trial)), seed), each))
        study.tell(trial, found[-1][0])
    return min(found)


def population(
    make: Callable[[Mapping[str, Any], int], Inner],
    space: Space,
    members: int,
    each: int,
    seed: int,
    rounds: int = 10,
    look: Callable[[int, Pair], None] | None = None,
) -> Pair:
    """Population-based training (Jaderberg et al. 2017): the worse third copies the better one.

    An own short implementation: members take turns in one process, at equal steps.

    Copied values are moved by ±0.5 in the unconstrained coordinate, or drawn anew (chance 1/4).
    What the gradient does not own stays as it is: weights of another shape cannot be copied.
    `look` is called after each round with the steps of all members and the best losses so far.
    """
    draw = random.Random(seed)
    every = space.own(**dict.fromkeys(space.grad, "sampler"))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))

    def fresh() -> dict[str, Any]:
        values = every.suggest(study.ask())
        return _inside(space, {name: values[name] for name in space.grad if name in values})

    inners = [make({} if i == 0 else fresh(), seed) for i in range(members)]
    third, best = max(1, members // 3), (float("inf"), float("inf"))
    for round_ in range(rounds):
        for inner in inners:
            for _ in range(each // rounds):
                inner.step()
        losses = [(i.evaluate("val")["loss"], i.evaluate("test")["loss"]) for i in inners]
        best = min(best, *losses)
        if look is not None:
            look((round_ + 1) * members * (each // rounds), best)
        order = sorted(range(members), key=lambda k: losses[k])
        for loser, winner in zip(order[-third:], order[:third], strict=True):
            inners[loser].load_state_dict(copy(inners[winner].state_dict()))
            if draw.random() < 0.25:
                given = make(fresh(), seed).hparams
            else:
                own = inners[loser].space  # with the shapes that the network gave it
                z = own.coordinates(inners[loser].hparams)
                given = own.constrain({n: v + draw.choice((-0.5, 0.5)) for n, v in z.items()})
            inners[loser].set_hparams(given)
    return best


def _inside(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Move values that a sampler put on a bound a little inside."""
    found = {}
    for name, value in values.items():
        domain: Any = space[name]
        low, high = domain.low, domain.high
        edge = 1e-3 * (high - low)
        logarithmic = domain.scale == "log"
        found[name] = (
            min(max(value, low * 1.001), high * 0.999)
            if logarithmic
            else min(max(value, low + edge), high - edge)
        )
    return found


def compare(
    make: Make,
    space: Space,
    algorithms: Mapping[str, SelfTuning],
    starts: Mapping[str, Mapping[str, Any]],
    steps: int,
    seeds: int,
    trials: Sequence[int] = (3, 6),
) -> tuple[dict[str, list[Pair]], dict[str, list[Any]]]:
    """Run all ways on all seeds; returns losses by way, and the results of self-tuned runs.

    A search is run with each number of `trials`, which share its steps; PBT with the largest.
    """
    found: dict[str, list[Pair]] = {}
    results: dict[str, list[Any]] = {}

    def note(name: str, pair: Pair) -> None:
        found.setdefault(name, []).append(pair)
        print(f"{name}: validation {pair[0]:.4f}, test {pair[1]:.4f}", flush=True)

    for seed in range(seeds):
        note("defaults", trained(make({}, seed), steps))
        for title, algorithm in algorithms.items():
            for where, start in starts.items():
                name = f"{title}{where}"
                pair, result = self_tuned(make, algorithm, start, steps, seed)
                note(name, pair)
                results.setdefault(name, []).append(result)
            first = f"{title}{next(iter(starts))}"
            last = results[first][-1]
            end = {k: v.detach() for k, v in last.hparams.items()}
            note(f"{first}: fixed at the end", trained(make(end, seed), steps))
            note(f"{first}: fresh on its schedule", replayed(make, last, {}, steps, seed))
        for count in trials:
            each = SHARE * steps // count
            sampler: Any = optuna.samplers.RandomSampler(seed=seed)
            pair = sampled(make, space, sampler, count, each, seed)
            note(f"random search, {count} trials of {each} steps", pair)
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=2)
            pair = sampled(make, space, sampler, count, each, seed)
            note(f"TPE, {count} trials of {each} steps", pair)
        members, each = max(trials), SHARE * steps // max(trials)
        pair = population(make, space, members, each, seed)
        note(f"PBT, {members} members with {each} steps", pair)
    return found, results


def losses_table(found: Mapping[str, list[Pair]]) -> str:
    """Means over seeds."""
    rows = [
        [name, mean([p[0] for p in pairs], 3), mean([p[1] for p in pairs], 3)]
        for name, pairs in found.items()
    ]
    return table(["way", "validation loss", "test loss"], rows)


def draw_schedules(results: Mapping[str, list[Any]], space: Space, path: Any) -> None:
    """Every hyperparameter over training steps, one line for each self-tuned run of seed 0."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = 4
    lines = -(-len(space) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.2 * columns, 2.4 * lines))
    for axis, name in zip(axes.flat, space, strict=False):
        for title, runs in results.items():
            schedule = runs[0].schedule
            axis.plot(schedule["step"], schedule[name], lw=1.2, label=title)
        axis.set_title(name, fontsize=9)
        if getattr(space[name], "scale", "") == "log":
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(space) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("training step", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
