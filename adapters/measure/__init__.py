"""Measurements of trained networks, for reports and as outer objectives."""

from adapters.measure.intruders import (
    Intruders,
    effective_rank,
    intruder_penalty,
    intruders,
    shrink_intruders,
)

__all__ = ["Intruders", "effective_rank", "intruder_penalty", "intruders", "shrink_intruders"]
