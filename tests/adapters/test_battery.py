"""The shared battery, over every learner of the registry and one of a user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters import Method, Trainer, registry
from bilevel import Float, Grad, Space
from tests.adapters.battery import CHECKS, LEARNERS, Subject


class Focal(Method):
    """Focal loss: easy samples weigh less (Lin et al., ICCV 2017, equation 4)."""

    name = "focal"
    space = Space(
        lr=Float(1e-3, 1.0, log=True, default=0.1),
        gamma=Grad(1.0, low=0.0, high=5.0, doc="focusing exponent"),
    )

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Any) -> Tensor:
        log_p = -F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        weight = (1 - log_p.exp()) ** hparams["gamma"]
        loss: Tensor = -(weight * log_p).mean()
        return loss


SUBJECTS = {**LEARNERS, "focal (a user's own)": Subject(Trainer.of(Focal))}


def test_the_battery_covers_the_registry() -> None:
    assert set(LEARNERS) == set(registry.names())


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_battery(name: str, check: Callable[[Subject], None]) -> None:
    check(SUBJECTS[name])
