"""The trainer: runs any `Method` as a learner, with all of its state explicit."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from adapters import artifacts
from adapters.functional import Functional
from adapters.learner import Learner
from adapters.method import Batch, Method, Setting
from adapters.method import State as MethodState
from adapters.stream import Stream
from adapters.tasks import Task
from adapters.updates import edited
from bilevel.metrics import Cost, Metrics, RunStatus
from bilevel.space import Space
from hypergrad import Problem, TwoViewLoss, seeded
from hypergrad.attention import math_attention
from hypergrad.optimizers import Hyper, Optimizer, State, Value, Values
from hypergrad.optimizers.flat import flatten, unflatten
from hypergrad.optimizers.values import constants
from hypergrad.training import is_finite
from hypergrad.tree import trainable_leaves, zeros_for_none

__all__ = ["Trainer"]

EVALUATION_ROWS = 4096
"""Most samples in one forward pass of an evaluation, and in one outer batch."""


class Trainer(Learner):
    """Runs a `Method` step by step; the inner level (`bilevel.Inner`) of every smooth method.

    A step draws a batch, takes the gradient of ``loss + penalty`` on it and applies the
    method's update rule to one flat vector of all trained tensors: the same numbers, bit for
    bit, as the forward pass of `hypergrad.Unrolled` on `problem`.

    The losses of `problem` are pure: their random draws come from ``batch["seed"]``, and
    BatchNorm statistics that they would change stay as they are.  Steps update those
    statistics; weights that an estimator trained (`adopt`) get them from the same batches.

    A loss, gradient or weight that is not finite ends the run: the status is DIVERGED, weights
    and statistics are those before the step, and further steps change nothing.

    Attributes:
        method_type: the method; subclasses made by `Trainer.of` set it.
        method: the method of this run; there after `setup`.

    Args:
        space: the method's space with other owners or ranges.
        horizon: steps that the knots of a scheduled hyperparameter span; it keeps its last
            value afterwards.
    """

    method_type: ClassVar[type[Method]]

    method: Method

    def __init__(self, space: Space | None = None, *, horizon: int | None = None) -> None:
        super().__init__(space)
        if horizon is not None and horizon < 1:
            raise ValueError(f"horizon must be at least 1, but got {horizon}.")
        self._horizon = horizon
        self._declared = self.space
        self._ready = False

    @staticmethod
    def of(method: type[Method]) -> type[Trainer]:
        """Return the learner class that runs a method.

        Raises:
            TypeError: the method has no name, space or docstring.
        """
        for needed in ("name", "space"):
            if not hasattr(method, needed):
                raise TypeError(f"{method.__name__} must have a {needed}; see adapters.Method.")
        if not method.__doc__:
            raise TypeError(f"{method.__name__} needs a docstring: its first line is shown.")
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
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be a non-negative integer, but got {seed!r}.")
        values = self._declared.validate(hparams, dtype=task.dtype, device=task.device)
        scheduled = [n for n in values if getattr(self._declared[n], "schedule", None)]
        if scheduled and self._horizon is None:
            raise ValueError(f"{scheduled[0]} has a schedule, so {self.name} needs a horizon.")
        self._task, self._seed = task, seed
        self.method = self.method_type()
        self.method.memory = {}
        resolved = artifacts.resolve(self.needs, task, seed)
        self.method.setting = Setting(task, values, resolved, seed)
        unused = [name for name in self.method.unused() if name in self._declared.grad]
        self.space = self._declared.own(**dict.fromkeys(unused, "fixed"))
        moving = [name for name in self.space.grad if name in values]
        kept = {name: value for name, value in values.items() if name not in moving}
        self.method.setting = Setting(task, kept, resolved, seed)
        with seeded(_derive(seed, "weights"), [task.device]):
            self._model = self.method.network().to(task.device, task.dtype)
            self.method.attach(self._model)
        shapes = self.method.shapes(self._model)
        wide = {n: tuple(s) for n, s in shapes.items() if n in moving}
        self.space = self.space.reshape(**wide)
        self._hparams = {
            name: values[name].expand(wide.get(name, values[name].shape)).clone() for name in moving
        }
        self._step, self._phase_index = 0, 0
        self._status = RunStatus.RUNNING
        self._outer_stream = Stream(task.split("val"), _derive(seed, "outer"))
        self._start_phase()
        self._ready = True

    def _start_phase(self) -> None:
        """Collect what the current phase trains, and start its data and its optimizer."""
        self._functional = Functional(self._model, self.method.set_mode)
        self._leaves = trainable_leaves(self._functional.trained)
        self._flat = flatten(self._leaves.tensors)
        self._stream = Stream(self.method.pool(self._phase), _derive(self._seed, self._phase))
        rule = self.method.optimizer(self._hyper)
        names = list(self._functional.trained)
        self._optimizer = edited(rule, self.method, self._leaves, names)
        self._optimizer_state: State = self._optimizer.init(self._flat)
        self._values: Values | None = None
        self._resolved  # noqa: B018  (refuses bad values at once)
        inner = self._inner_views if self._has_detached else self._inner_loss
        self._problem = Problem(cast(Any, inner), self._outer_loss)

    def _hyper(self, name: str) -> Value:
        """Return what an optimizer field takes for a hyperparameter."""
        if name in self._hparams:
            domain = self.space[name]
            if getattr(domain, "schedule", None) is not None:
                raise ValueError(
                    f"{name} has schedule={domain.schedule}, but optimizer hyperparameters are "  # type: ignore[attr-defined]
                    "constant inside a step; let the outer loop move it instead."
                )
            return Hyper(name)
        return self.method.setting.constants[name]

    @property
    def _phase(self) -> str:
        return self.phases[self._phase_index]

    @property
    def _has_detached(self) -> bool:
        return type(self.method).detached is not Method.detached

    # The inner level.

    @property
    def problem(self) -> Problem:
        """The pure losses; hparams are the gradient-owned values by name."""
        return self._problem

    @property
    def params(self) -> dict[str, Tensor]:
        """Trained tensors by name."""
        return cast(dict[str, Tensor], self._tree(self._flat))

    @property
    def optimizer(self) -> Optimizer:
        """The update rule of the current phase."""
        return self._optimizer

    @property
    def optimizer_state(self) -> State:
        """State of the update rule at the current weights."""
        return self._optimizer_state

    @property
    def hparams(self) -> dict[str, Tensor]:
        """Gradient-owned values."""
        return dict(self._hparams)

    @property
    def status(self) -> RunStatus:
        """RUNNING, or why no further step is possible."""
        return self._status

    def set_hparams(self, values: Mapping[str, Tensor]) -> None:
        """Replace gradient-owned values.

        Raises:
            ValueError: a name that the gradient does not own, or another shape.
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
            self._hparams[name] = value.detach().to(now).clone()
        self._values = None

    def inner_batches(self, count: int) -> list[dict[str, Any]]:
        """Draw the next training batches."""
        self._drawn = [self._draw(self._step + i) for i in range(count)]
        return self._drawn

    def outer_batch(self) -> dict[str, Any]:
        """Return all validation samples, or the next `EVALUATION_ROWS` of more."""
        split = self._task.split("val")
        rows = len(split["x"])
        if rows > EVALUATION_ROWS:
            batch = self._outer_stream.draw(EVALUATION_ROWS)
        else:
            batch = {**split, "index": torch.arange(rows, device=self._task.device), "seed": 0}
        return {**batch, "step": self._step, "phase": self._phase}

    def adopt(self, params: Mapping[str, Tensor], optimizer_state: State, steps: int) -> None:
        """Take over weights that an estimator trained on the last drawn batches."""
        leaves = trainable_leaves(dict(params))
        if leaves.names != self._leaves.names:
            raise ValueError(f"params must hold {self._leaves.names}, but got {leaves.names}.")
        self._flat, self._optimizer_state = flatten(leaves.tensors), optimizer_state
        self._step += steps
        if steps and any(True for _ in self._model.buffers()):
            with torch.no_grad():
                for batch in self._drawn[-steps:]:
                    self._loss(self._tree(self._flat), self._hparams, batch, live=True)

    # Training.

    def step(self) -> Metrics:
        """See `Learner.step`."""
        self._check_ready()
        began = time.perf_counter()
        if self._status.finished:
            return Metrics({"loss": math.nan}, status=self._status)
        batch = self._draw(self._step)
        buffers = {n: b.clone() for n, b in self._model.named_buffers()}
        loss, after = self._update(batch)
        if after is None:
            self._status = RunStatus.DIVERGED
            for name, buffer in self._model.named_buffers():
                buffer.copy_(buffers[name])
        else:
            self._flat, self._optimizer_state = after
            self._step += 1
            self._hooks()
        return Metrics(
            {"loss": loss},
            status=self._status,
            cost=Cost(steps=1, gradients=1, seconds=time.perf_counter() - began),
        )

    def _update(self, batch: Batch) -> tuple[float, tuple[Tensor, State] | None]:
        """Return the loss and the next weights and optimizer state; None where not finite."""
        views = [v.requires_grad_() for v in unflatten(self._flat, self._leaves.tensors)]
        with torch.enable_grad(), math_attention():
            loss = self._loss(self._leaves.rebuild(views), self._hparams, batch, live=True)
            value = float(loss.detach())
            if not math.isfinite(value):
                return value, None
            found = torch.autograd.grad(loss, views, allow_unused=True)
        grad = flatten(zeros_for_none(found, views))
        with torch.no_grad():
            flat, state = self._optimizer.update(
                self._flat, grad, self._optimizer_state, self._resolved
            )
        return value, (flat, state) if is_finite(flat) else None

    @property
    def _resolved(self) -> Values:
        """Values of the optimizer's hyperparameters, looked up when they change."""
        if self._values is None:
            given = {n: v.detach().requires_grad_() for n, v in self._hparams.items()}
            self._values = constants(self._optimizer.resolve(given, self._leaves))
        return self._values

    def _hooks(self) -> None:
        """Call what the method does after a step, and move on to the next phase."""
        method = self.method
        due = [h for h, interval in self._periodic() if self._step % interval == 0]
        edits = type(method).after_step is not Method.after_step or due
        last = self._phase_index == len(self.phases) - 1
        if not edits and last:
            return
        state = self._method_state()
        with torch.no_grad():
            method.after_step(state)
            for hook in due:
                hook(state)
        if not last and method.done(state):
            self._next_phase(state)

    def _periodic(self) -> list[tuple[Any, int]]:
        """Hooks decorated by `every`, with their intervals in steps."""
        found = []
        for attribute in dir(type(self.method)):
            interval = getattr(getattr(type(self.method), attribute), "interval", None)
            if interval is not None:
                steps = interval if isinstance(interval, int) else self._all_values()[interval]
                found.append((getattr(self.method, attribute), int(steps)))
        return found

    def _method_state(self) -> MethodState:
        views = dict(
            zip(
                self._functional.trained,
                unflatten(self._flat, self._leaves.tensors),
                strict=True,
            )
        )
        return MethodState(
            self._model,
            views,
            self._optimizer_state,
            self._all_values(),
            self._step,
            self._phase,
        )

    def _next_phase(self, state: MethodState) -> None:
        self._functional.write(cast(dict[str, Tensor], self._tree(self._flat)))
        self._phase_index += 1
        self.method.begin(self._phase, state)
        self._start_phase()

    # Losses.

    def _inner_loss(self, params: Any, hparams: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return self._loss(params, hparams, batch, live=False)

    @property
    def _inner_views(self) -> TwoViewLoss:
        """The inner loss whose detached quantities come from a second view of the weights."""

        def loss(moving: Any, frozen: Any, hparams: Mapping[str, Tensor], batch: Batch) -> Tensor:
            return self._loss(moving, hparams, batch, live=False, frozen=frozen)

        return TwoViewLoss(loss)

    def _loss(
        self,
        params: Any,
        hparams: Mapping[str, Tensor],
        batch: Batch,
        *,
        live: bool,
        frozen: Any = None,
    ) -> Tensor:
        values = self._at(hparams, batch)
        call = partial(self._functional, training=True)
        with seeded(batch["seed"], [self._task.device]):
            if self._has_detached:
                if frozen is None:
                    with torch.no_grad():
                        extra = call(self.method.detached, params, values, batch)
                else:
                    extra = call(self.method.detached, frozen, values, batch)
                batch = {**batch, **extra}
            return call(self._objective, params, values, batch, live=live)

    def _objective(self, model: nn.Module, values: Mapping[str, Any], batch: Batch) -> Tensor:
        loss = self.method.loss(model, values, batch)
        penalty = self.method.penalty(model, values)
        return loss if penalty is None else loss + penalty

    def _outer_loss(self, params: Any, hparams: Mapping[str, Tensor], batch: Batch) -> Tensor:
        with seeded(batch["seed"], [self._task.device]):
            return self._functional(
                self.method.outer_loss, params, self._at(hparams, batch), batch, training=False
            )

    def _at(self, hparams: Mapping[str, Tensor], batch: Batch) -> dict[str, Any]:
        values = {**self.method.setting.constants, **hparams}
        if self._horizon is None:
            return values
        return self.space.at(values, min(1.0, batch["step"] / self._horizon))

    def _all_values(self) -> dict[str, Any]:
        return self._at(self._hparams, {"step": self._step})

    # Looking.

    def evaluate(self, split: str) -> Metrics:
        """See `Learner.evaluate`: means of the method's metrics over all samples of a split."""
        self._check_ready()
        data = self._task.split(split)
        rows = len(data["x"])
        totals: dict[str, float] = {}
        params, values = self._tree(self._flat), self._all_values()
        with torch.no_grad(), seeded(0, [self._task.device]):
            for start in range(0, rows, EVALUATION_ROWS):
                index = torch.arange(start, min(start + EVALUATION_ROWS, rows))
                index = index.to(self._task.device)
                batch = {**{k: v[index] for k, v in data.items()}, "index": index, "seed": 0}
                batch |= {"step": self._step, "phase": self._phase}
                measured = self._functional(
                    self.method.measure, params, values, batch, training=False
                )
                for name, each in measured.items():
                    totals[name] = totals.get(name, 0.0) + float(each.double().sum())
        return Metrics(
            {name: total / rows for name, total in totals.items()},
            roles=self.method.roles,
            status=self._status,
        )

    def module(self) -> nn.Module:
        """Return a plain copy of the trained network: merged, pruned, folded as the method says."""
        self._check_ready()
        self._functional.write(cast(dict[str, Tensor], self._tree(self._flat)))
        trained = copy.deepcopy(self._model).eval()
        return self.method.finish(trained, self._all_values())

    # State.

    def state_dict(self) -> dict[str, Any]:
        """See `Learner.state_dict`."""
        self._check_ready()
        return {
            "step": self._step,
            "phase": self._phase_index,
            "status": self._status.value,
            "params": self._flat.clone(),
            "constants": {n: t.detach().clone() for n, t in self._functional.constants.items()},
            "optimizer": dict(self._optimizer_state),
            "hparams": dict(self._hparams),
            "memory": copy.deepcopy(self.method.memory),
            "inner": self._stream.state_dict(),
            "outer": self._outer_stream.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Learner.load_state_dict`.

        Raises:
            ValueError: the state is that of other weights or hyperparameters.
        """
        self._check_ready()
        self.method.memory = copy.deepcopy(dict(state["memory"]))
        self.set_hparams(state["hparams"])
        self._step = state["step"]
        if state["phase"] != self._phase_index:
            self._phase_index = state["phase"]
            self.method.begin(self._phase, self._method_state())
            self._start_phase()
        if state["params"].shape != self._flat.shape:
            raise ValueError(
                f"saved params have {state['params'].numel()} numbers, but this network has "
                f"{self._flat.numel()}; set up with the same task and hyperparameters."
            )
        self._flat = state["params"].to(self._flat).clone()
        with torch.no_grad():
            for name, tensor in self._functional.constants.items():
                tensor.copy_(state["constants"][name])
        self._optimizer_state = dict(state["optimizer"])
        self._stream.load_state_dict(state["inner"])
        self._outer_stream.load_state_dict(state["outer"])
        self._status = RunStatus(state["status"])

    # Helpers.

    def _draw(self, step: int) -> dict[str, Any]:
        batch = self._stream.draw(self.method.batch_size(self._all_values()))
        return {**batch, "step": step, "phase": self._phase}

    def _tree(self, flat: Tensor) -> Any:
        views = [v.detach().requires_grad_() for v in unflatten(flat, self._leaves.tensors)]
        return self._leaves.rebuild(views)

    def _check_ready(self) -> None:
        if not self._ready:
            raise RuntimeError(f"{self.name}: call setup(task, hparams, seed=...) first.")


def _derive(seed: int, purpose: str) -> int:
    """Return an independent seed for one purpose of a run."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
