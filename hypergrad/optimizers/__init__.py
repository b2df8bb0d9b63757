"""Inner optimizers as pure update rules on one flat vector, differentiable in every number."""

from hypergrad.optimizers.adagrad import Adagrad
from hypergrad.optimizers.adam import Adam, AdamW
from hypergrad.optimizers.base import Optimizer, State
from hypergrad.optimizers.convert import from_torch
from hypergrad.optimizers.lion import Lion
from hypergrad.optimizers.rmsprop import RMSprop
from hypergrad.optimizers.sgd import SGD
from hypergrad.optimizers.torchopt import TorchOpt, as_optimizer
from hypergrad.optimizers.values import Hyper, Value, Values

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Hyper",
    "Lion",
    "Optimizer",
    "RMSprop",
    "State",
    "TorchOpt",
    "Value",
    "Values",
    "as_optimizer",
    "from_torch",
]
