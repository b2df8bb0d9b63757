"""The shared battery: over the registry, a user's own methods, and every hook of the trainer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adapters import Trainer, registry
from tests.adapters import methods
from tests.adapters.battery import CHECKS, LEARNERS, Subject
from tests.adapters.test_iterations import ITERATIONS

CANCER = {"task": "breast_cancer", "options": {}}
SMALL = {"width": 16, "depth": 1, "activation": "tanh"}

OTHERS = {
    "network with Adam": Subject(
        registry.get("network"), hparams={**SMALL, "optimizer": "adam", "lr": 0.01}
    ),
    "network on a table": Subject(registry.get("network"), hparams=SMALL, **CANCER),  # type: ignore[arg-type]
    **{
        f"own: {method.name}": Subject(
            Trainer.of(method),
            hparams=hparams,
            # Its weights p^ω vanish with the gradient when everything is wrong.
            diverges=method is not methods.Confident,
        )
        for method, hparams in (
            (methods.Focal, {}),
            (methods.Linear, {}),
            # Longer than the windows that are compared with Unrolled, which sees no hooks.
            (methods.Normalized, {"interval": 9}),
            (methods.Confident, {}),
            (methods.Scaled, {"lr": 0.02}),
            (methods.Adapter, {}),
            (methods.TwoPhases, {"first": 20}),
        )
    },
}

SUBJECTS = {**LEARNERS, **OTHERS}


def test_the_battery_covers_the_registry() -> None:
    assert set(LEARNERS) | set(ITERATIONS) == set(registry.names())


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_battery(name: str, check: Callable[[Subject], None]) -> None:
    check(SUBJECTS[name])
