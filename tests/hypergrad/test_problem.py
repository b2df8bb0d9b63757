"""What a problem is made of."""

from __future__ import annotations

import pytest
import torch

from hypergrad import Problem


def test_a_loss_is_a_function() -> None:
    with pytest.raises(TypeError, match=r"outer_loss must be a function .* but got 1"):
        Problem(lambda params, hparams, batch: torch.zeros(()), 1)  # type: ignore[arg-type]
