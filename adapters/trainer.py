"""The trainer: runs any `Method` as a learner, with all of its state explicit."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapters.assembly import assemble, derive_seed
from adapters.functional import copy_module
from adapters.learner import Learner
from adapters.level import Level
from adapters.method import Method, State
from adapters.phases import PhaseCache, check_scopes, later_names, phase_key
from adapters.stream import Stream
from adapters.tasks import Task
from bilevel import checkpoint
from bilevel.checks import integer
from bilevel.describe import describe, differences
from bilevel.metrics import Cost, Metrics, RunStatus
from bilevel.space import Space
from hypergrad import Problem, seeded
from hypergrad.optimizers import Optimizer
from hypergrad.optimizers import State as OptimizerState
from hypergrad.training import is_finite

__all__ = ["Trainer"]

EVALUATION_ROWS = 4096
"""Most samples in one forward pass of an evaluation, and in one outer batch."""


class Trainer(Learner):
    """Runs a `Method` step by step; the inner level (`bilevel.Inner`) of every smooth method.

    A step draws a batch, takes the gradient of ``loss + penalty`` on it and applies the
    method's update rule to one flat vector of all trained tensors: the same numbers, bit for
    bit, as the forward pass of `hypergrad.Unrolled` on `problem`.

    The losses of `problem` are pure, see `adapters.objective.Objective`.  BatchNorm statistics
    are moved by steps only; weights that an estimator trained (`adopt`) get them from the
    batches that it trained on.

    A loss, gradient or weight that is not finite ends the run: the status is DIVERGED, the
    weights are the last ones at which the training loss was finite, and further steps change
    nothing.

    Attributes:
        method_type: the method; subclasses made by `Trainer.of` set it.

    Args:
        space: the method's space with other owners or ranges.
        horizon: steps that the knots of a scheduled hyperparameter span; it keeps its last
            value afterwards.
        phase_cache: where finished phases are kept and looked up, a dict that several learners
            share.  A run then starts behind the phases that it has in common with an earlier
            one, as long as nothing moved the hyperparameters in them.

    Raises:
        ValueError: a space of another method, or a horizon that is not positive.
    """

    method_type: ClassVar[type[Method]]

    def __init__(
        self,
        space: Space | None = None,
        *,
        horizon: int | None = None,
        phase_cache: PhaseCache | None = None,
    ) -> None:
        super().__init__(space)
        self._horizon = None if horizon is None else integer("horizon", horizon, minimum=1)
        self._phase_cache = phase_cache
        self._declared = self.space
        self._ready = False

    @staticmethod
    def of(method: type[Method]) -> type[Trainer]:
        """Return the learner class that runs a method.

        Raises:
            TypeError: the method has no name, space or docstring.
            ValueError: its scopes do not fit its space and phases.
        """
        for needed in ("name", "space"):
            if not hasattr(method, needed):
                raise TypeError(f"{method.__name__} must have a {needed}; see adapters.Method.")
        if not method.__doc__:
            raise TypeError(f"{method.__name__} needs a docstring: its first line is shown.")
        check_scopes(method)
        members = {
            "method_type": method,
            "name": method.name,
            "space": method.space,
            "needs": method.needs,
            "phases": method.phases,
            "__doc__": method.__doc__,
            "__module__": method.__module__,
        }
        return type(method.__name__, (Trainer,), members)

    # Set-up.

    def setup(self, task: Task, hparams: Mapping[str, Any], *, seed: int) -> None:
        """See `Learner.setup`."""
        kind = self.method_type.task_type
        if not isinstance(task, kind):
            raise ValueError(
                f"{self.name} needs a task of type {kind.__name__}, but {task.name!r} is a "
                f"{type(task).__name__}."
            )
        self._ready = False
        self._task, self._given = task, dict(hparams)
        self._seed = integer("seed", seed, minimum=0)
        self._outer_stream = Stream(task.split("val"), derive_seed(seed, "outer"))
        self._status, self._moved = RunStatus.RUNNING, False
        self._assemble()
        self._ready = True
        if self._phase_cache:
            self._skip_phases(self._phase_cache)

    def _assemble(self) -> None:
        """Start at the first phase with the initial weights and values."""
        self._assembly = assemble(
            self.method_type, self._declared, self._task, self._given, self._seed
        )
        self.space = self._assembly.space
        self._hparams = dict(self._assembly.hparams)
        if self._assembly.schedules and self._horizon is None:
            raise ValueError(
                f"{', '.join(self._assembly.schedules)} has a schedule, so {self.name} needs a "
                "horizon: the number of steps that its knots span."
            )
        self._phase_index, self._step = 0, 0
        self._start_phase()

    def _start_phase(self) -> None:
        """Collect what the current phase trains, and start its data and its optimizer."""
        self._level = Level(self._assembly, self._horizon, self._step)
        self._flat = self._level.initial
        self._good: Tensor | None = None
        self._optimizer_state: OptimizerState = self.optimizer.init(self._flat)
        self._values = self._level.resolve(self._hparams)
        self._stream = Stream(
            self.method.pool(self.phase),
            derive_seed(self._seed, self.phase),
            shuffle=self.method.shuffle,
        )
        self._drawn: list[dict[str, Any]] = []

    @property
    def method(self) -> Method:
        """The method of this run; there after `setup`."""
        return self._assembly.method

    @property
    def phase(self) -> str:
        """Name of the current phase."""
        return self.phases[self._phase_index]

    # The inner level.

    @property
    def problem(self) -> Problem:
        """The pure losses; hparams are the gradient-owned values by name."""
        return self._level.objective.problem

    @property
    def params(self) -> dict[str, Tensor]:
        """Trained tensors by name."""
        named = self._level.named(self._flat)
        return {name: value.detach().requires_grad_() for name, value in named.items()}

    @property
    def frozen(self) -> dict[str, Tensor]:
        """Parameters that the current phase does not train, by name."""
        return {n: p.detach() for n, p in self._level.objective.functional.frozen.items()}

    @property
    def optimizer(self) -> Optimizer:
        """The update rule of the current phase."""
        return self._level.optimizer

    @property
    def optimizer_state(self) -> OptimizerState:
        """State of the update rule at the current weights."""
        return self._optimizer_state

    @property
    def hparams(self) -> dict[str, Tensor]:
        """Gradient-owned values."""
        return {name: value.detach().requires_grad_() for name, value in self._hparams.items()}

    @property
    def status(self) -> RunStatus:
        """RUNNING, or why no further step is possible."""
        return self._status

    def set_hparams(self, values: Mapping[str, Tensor]) -> None:
        """Replace gradient-owned values.

        Raises:
            ValueError: a name that the gradient does not own, another shape, or a number that
                is not finite.
        """
        for name, value in values.items():
            if name not in self._hparams:
                raise ValueError(
                    f"{name!r} is not owned by the gradient; expected names of "
                    f"{list(self._hparams)}."
                )
            now = self._hparams[name]
            if value.shape != now.shape:
                raise ValueError(
                    f"{name} must have shape {tuple(now.shape)}, but got {tuple(value.shape)}."
                )
            if not is_finite(value.detach()):
                raise ValueError(f"{name} must be finite, but got {value.detach()}.")
        self._hparams |= {n: v.detach().to(self._hparams[n]).clone() for n, v in values.items()}
        self._values = self._level.resolve(self._hparams)
        self._moved = True

    def inner_batches(self, count: int) -> list[dict[str, Any]]:
        """Draw the next training batches."""
        self._drawn = [self._draw(self._step + i) for i in range(count)]
        return self._drawn

    def outer_batch(self) -> dict[str, Any]:
        """Return all validation samples, or the next `EVALUATION_ROWS` of more."""
        split = self._task.split("val")
        rows = len(split["x"])
        if rows > EVALUATION_ROWS:
            return self._now(self._outer_stream.draw(EVALUATION_ROWS))
        return self._now({**split, "index": torch.arange(rows, device=self._task.device)})

    def adopt(
        self, params: Mapping[str, Tensor], optimizer_state: OptimizerState, steps: int
    ) -> None:
        """Take over weights that an estimator trained for `steps` steps on the last drawn batches.

        Hooks of the method that were due in between run once, now; `Method.after_batch` sees
        every batch with the new weights, and `Method.uses_grads` gets the gradient there.

        Raises:
            ValueError: other names or shapes than `params` has, or another optimizer's state.
        """
        flat = self._level.pack(params)
        self.optimizer.check_state(optimizer_state, flat)
        self._flat, self._optimizer_state, self._good = flat, dict(optimizer_state), None
        self._moved = True
        notes = type(self.method).after_batch is not Method.after_batch
        if steps and (notes or self._level.objective.functional.buffers):
            with torch.no_grad():
                for drawn in self._drawn[-steps:]:
                    batch = {**drawn, "kept": {}}
                    self._level.objective.training_loss(
                        self.params, self._hparams, batch, live=True
                    )
                    self.method.after_batch(batch)
        grad = None
        if steps and self._drawn and self.method.uses_grads:
            last = {**self._drawn[-1], "kept": {}}
            _, grad = self._level.gradient(self._flat, self._hparams, last, live=False)
        self._advance(steps, grad)

    # Training.

    def step(self) -> Metrics:
        """See `Learner.step`."""
        self._check_ready()
        began = time.perf_counter()
        if self._status.finished:
            return Metrics({"loss": math.nan}, status=self._status)
        phase, live = self._phase_index, self._level.objective.functional.buffers
        before = {name: buffer.clone() for name, buffer in live.items()}
        batch = {**self._draw(self._step), "kept": {}}
        loss, after = self._level.update(
            self._flat, self._optimizer_state, self._hparams, self._values, batch
        )
        entries = {"loss": loss}
        if after is not None:
            self._good, self._flat, self._optimizer_state = self._flat, after.flat, after.state
            entries |= self.method.after_batch(batch)
            self._advance(1, after.grad)
        else:
            self._status = RunStatus.DIVERGED
            for name, buffer in live.items():
                buffer.copy_(before[name])
            if not math.isfinite(loss) and self._good is not None:
                self._flat = self._good
        if len(self.phases) > 1:
            entries["phase_done"] = float(self._phase_index > phase)
        return Metrics(
            entries,
            roles={**self.method.roles, "phase_done": "diagnostic"},
            status=self._status,
            cost=Cost(steps=1, gradients=1, seconds=time.perf_counter() - began),
        )

    def _advance(self, steps: int, grad: Tensor | None = None) -> None:
        """Count steps, call the method's hooks, and move on to the next phase."""
        before, self._step = self._step, self._step + steps
        method, last = self.method, self._phase_index == len(self.phases) - 1
        due = [h for h, n in self._assembly.periodic if self._step // n > before // n]
        each = type(method).after_step is not Method.after_step
        if not steps or not (due or each or not last):
            return
        state = self._editable(grad)
        with torch.no_grad():
            method.after_step(state)
            for hook in due:
                hook(state)
        self._optimizer_state = state.optimizer
        if not last and method.done(state):
            if self._phase_cache is not None and not self._moved:
                self._phase_cache[self._key(self.phase)] = self.state_dict()
            self._begin_phase(self._phase_index + 1)

    def _editable(self, grad: Tensor | None = None) -> State:
        """Return the moving part for hooks to edit; nobody else holds its tensors."""
        self._flat = self._flat.clone()
        return State(
            self._assembly.model,
            self._level.named(self._flat),
            None if grad is None else self._level.named(grad),
            checkpoint.copy(self._optimizer_state),
            self._level.objective.values(self._hparams, self._step),
            self._step,
            self.phase,
        )

    # Phases.

    def _begin_phase(self, index: int) -> None:
        self._level.objective.functional.write(self._level.named(self._flat))
        self._phase_index = index
        with seeded(derive_seed(self._seed, f"begin {self.phase}"), [self._task.device]):
            self.method.begin(self.phase, self._editable())
        self._start_phase()

    def _key(self, phase: str) -> str:
        values = self._level.objective.values(self._hparams, self._step)
        return phase_key(self.method_type, self._task, self._seed, values, phase)

    def _skip_phases(self, cache: PhaseCache) -> None:
        """Start behind the last phase that an earlier run has finished in the same way."""
        for index in reversed(range(len(self.phases) - 1)):
            saved = cache.get(self._key(self.phases[index]))
            if saved is not None:
                later = later_names(self.method_type, self.phases[index])
                mine = {n: v for n, v in self._hparams.items() if n in later}
                self._restore({**saved, "hparams": {**saved["hparams"], **mine}})
                self._begin_phase(index + 1)
                return

    # Looking.

    def evaluate(self, split: str) -> Metrics:
        """See `Learner.evaluate`: means of the method's metrics over all samples of a split."""
        self._check_ready()
        began = time.perf_counter()
        data = self._task.split(split)
        rows = len(data["x"])
        totals: dict[str, float] = {}
        for start in range(0, rows, EVALUATION_ROWS):
            index = torch.arange(start, min(start + EVALUATION_ROWS, rows))
            index = index.to(self._task.device)
            batch = self._now({**{k: v[index] for k, v in data.items()}, "index": index})
            measured = self._level.objective.measure(self.params, self._hparams, batch)
            for name, each in measured.items():
                if not isinstance(each, Tensor):
                    raise TypeError(
                        f"{self.method.name}: measure must return a tensor for each metric, one "
                        f"value a sample, but {name} is {each!r}."
                    )
                totals[name] = totals.get(name, 0.0) + float(each.double().sum())
        return Metrics(
            {name: total / rows for name, total in totals.items()},
            roles=self.method.roles,
            status=self._status,
            cost=Cost(seconds=time.perf_counter() - began),
        )

    def module(self) -> nn.Module:
        """Return a plain copy of the trained network: merged, pruned, folded as the method says."""
        self._check_ready()
        self._level.objective.functional.write(self._level.named(self._flat))
        trained = copy_module(self._assembly.model).eval()
        values = self._level.objective.values(self._hparams, self._step)
        return self.method.finish(trained, values)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """See `Learner.state_dict`."""
        self._check_ready()
        state: dict[str, Any] = {
            "run": self._description(),
            "step": self._step,
            "phase": self._phase_index,
            "status": self._status.value,
            "moved": self._moved,
            "params": self._flat,
            "good": self._good,
            "constants": self._level.objective.functional.constants,
            "optimizer": self._optimizer_state,
            "hparams": self._hparams,
            "memory": self.method.memory,
            "inner": self._stream.state_dict(),
            "outer": self._outer_stream.state_dict(),
        }
        return dict(checkpoint.copy(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Learner.load_state_dict`.

        Raises:
            ValueError: the state is of another method, task, seed, space or constant; says which.
        """
        self._check_ready()
        changed = differences(state["run"], self._description(), "run")
        if changed:
            raise ValueError("the saved state is of another run:\n  " + "\n  ".join(changed))
        self._restore(state)

    def _description(self) -> dict[str, Any]:
        """What must be the same on both sides of a break."""
        return {
            "learner": self.name,
            "task": self._task.fingerprint,
            "seed": self._seed,
            "space": self.space.fingerprint,
            "horizon": self._horizon,
            "constants": describe(self.method.setting.constants),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        state = checkpoint.copy(dict(state))
        if self._phase_index or state["phase"]:
            # Network and optimizer take the form that they have in the saved phase.
            self._assemble()
            for index in range(1, state["phase"] + 1):
                self.method.memory = checkpoint.copy(state["memory"])
                self._begin_phase(index)
        self.method.memory = state["memory"]
        self.set_hparams(state["hparams"])
        self._step, self._moved = state["step"], state["moved"]
        self._status = RunStatus(state["status"])
        self._flat, self._good = state["params"].to(self._flat), state["good"]
        with torch.no_grad():
            for name, tensor in self._level.objective.functional.constants.items():
                tensor.copy_(state["constants"][name])
        self._optimizer_state = state["optimizer"]
        self._stream.load_state_dict(state["inner"])
        self._outer_stream.load_state_dict(state["outer"])

    # Helpers.

    def _draw(self, step: int) -> dict[str, Any]:
        size = self.method.batch_size(self._level.objective.values(self._hparams, step))
        return {**self._stream.draw(size), "step": step, "phase": self.phase}

    def _now(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"seed": 0, **batch, "step": self._step, "phase": self.phase}

    def _check_ready(self) -> None:
        if not self._ready:
            raise RuntimeError(f"{self.name}: call setup(task, hparams, seed=...) first.")
