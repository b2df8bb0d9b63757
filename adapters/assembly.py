"""What `Trainer.setup` puts together: the method, its network, and the values of a run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adapters import artifacts
from adapters.method import Method, Setting, State
from adapters.tasks import Task
from bilevel.domains import Domain, Grad
from bilevel.space import Space
from hypergrad import seeded

__all__ = ["Assembly", "assemble", "derive_seed"]


@dataclass(frozen=True)
class Assembly:
    """A method on a network, before its first step.

    Attributes:
        method: the method; its setting holds the constants of the run.
        model: the network, with the initial weights.
        space: the declared space with shapes filled in and idle names fixed.
        hparams: initial gradient-owned values.
        schedules: active hyperparameters that follow knots, whoever owns them.
        periodic: hooks decorated by `every`, with their intervals in steps.
    """

    method: Method
    model: nn.Module
    space: Space
    hparams: dict[str, Tensor]
    schedules: dict[str, Grad]
    periodic: list[tuple[Callable[[State], None], int]]


def assemble(
    kind: type[Method], declared: Space, task: Task, given: Mapping[str, Any], seed: int
) -> Assembly:
    """Build the network of a method and check the values of a run.

    Args:
        kind: the method.
        declared: its space, with the owners of this run.
        task: gives dtype and device.
        given: values of some hyperparameters.
        seed: of the run.

    Raises:
        TypeError, ValueError: see `Space.validate` and `artifacts.resolve`.
    """
    # The shape of some gradient-owned values is only known once the network is there.
    early = {name: value for name, value in given.items() if name not in declared.grad}
    constants = declared.validate(early, dtype=task.dtype, device=task.device)
    moving = [name for name in declared.grad if name in constants]
    method = kind()
    method.memory = {}
    method.setting = Setting(
        task,
        {name: value for name, value in constants.items() if name not in moving},
        {name: given.get(name, constants[name]) for name in moving},
        artifacts.resolve(kind.needs, task, seed),
        seed,
    )
    with seeded(derive_seed(seed, "weights"), [task.device]):
        model = method.network().to(task.device, task.dtype)
        method.attach(model)

    shapes = {name: tuple(shape) for name, shape in method.shapes(model).items()}
    space = declared.reshape(**{name: shapes[name] for name in moving if name in shapes})
    filled = {name: _fill(value, declared[name], space[name]) for name, value in given.items()}
    values = space.validate(filled, dtype=task.dtype, device=task.device)
    idle = {name: values[name] for name in method.idle() if name in moving}
    constants = {n: v for n, v in values.items() if n not in moving or n in idle}
    method.setting = dataclasses.replace(method.setting, constants=constants)
    space = space.fix(**idle)
    return Assembly(
        method,
        model,
        space,
        {name: values[name] for name in moving if name not in idle},
        {
            name: domain
            for name, domain in space.items()
            if name in values and isinstance(domain, Grad) and domain.schedule is not None
        },
        list(_periodic(method, values)),
    )


def _fill(value: Any, declared: Domain, now: Domain) -> Any:
    """Return a tensor of the declared shape in the shape that the network gave it."""
    if not (isinstance(value, Tensor) and isinstance(declared, Grad) and isinstance(now, Grad)):
        return value
    if value.shape != declared.value_shape or value.shape == now.value_shape:
        return value
    more = len(now.shape) - len(declared.shape)
    return value.reshape(*value.shape, *[1] * more).expand(now.value_shape)


def _periodic(
    method: Method, values: Mapping[str, Any]
) -> Iterator[tuple[Callable[[State], None], int]]:
    for attribute in dir(type(method)):
        interval = getattr(getattr(type(method), attribute), "interval", None)
        if interval is None:
            continue
        steps = values.get(interval) if isinstance(interval, str) else interval
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(
                f"{type(method).__name__}.{attribute}: every({interval!r}) needs an active "
                f"hyperparameter with a positive integer value, but got {steps!r}."
            )
        yield getattr(method, attribute), steps


def derive_seed(seed: int, purpose: str) -> int:
    """Return an independent seed for one purpose of a run."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
