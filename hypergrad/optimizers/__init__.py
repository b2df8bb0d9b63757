"""Inner optimizers as pure update rules on one flat vector, differentiable in every number."""

from hypergrad.optimizers.adam import Adam, AdamW
from hypergrad.optimizers.base import Optimizer, State
from hypergrad.optimizers.sgd import SGD
from hypergrad.optimizers.values import Hyper, Value, Values

__all__ = ["SGD", "Adam", "AdamW", "Hyper", "Optimizer", "State", "Value", "Values"]
