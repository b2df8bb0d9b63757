"""Self-tuning networks: weights that respond to the hyperparameters, tuned while they train."""

from bilevel.self_tuning.algorithm import SelfTuning, SelfTuningState
from bilevel.self_tuning.check import ResponseCheck, jacobian_check
from bilevel.self_tuning.convert import Converted, convert
from bilevel.self_tuning.dropout import LockedDropout, TunedDropout
from bilevel.self_tuning.layout import Layout
from bilevel.self_tuning.loader import AugmentedDataset, HyperSource, loader_stream
from bilevel.self_tuning.network import ModuleInner
from bilevel.self_tuning.regularizers import (
    activation_penalty,
    cutout,
    mixup,
    noisy,
    smoothed_cross_entropy,
    squared_norm,
    temporal_penalty,
)

__all__ = [
    "AugmentedDataset",
    "Converted",
    "HyperSource",
    "Layout",
    "LockedDropout",
    "ModuleInner",
    "ResponseCheck",
    "SelfTuning",
    "SelfTuningState",
    "TunedDropout",
    "activation_penalty",
    "convert",
    "cutout",
    "jacobian_check",
    "loader_stream",
    "mixup",
    "noisy",
    "smoothed_cross_entropy",
    "squared_norm",
    "temporal_penalty",
]
