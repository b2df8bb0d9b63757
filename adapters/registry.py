"""Learners by name.  A new method is one file and one line of `_MODULES`."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TypeVar

from adapters.iteration import Iterated, Iteration
from adapters.learner import Learner
from adapters.method import Method
from adapters.trainer import Trainer
from bilevel.checks import did_you_mean

__all__ = ["describe", "get", "names", "register"]

_MODULES = {
    "adalora": "adapters.weights.adalora:AdaLoRAMethod",
    "adawac": "adapters.objectives.adawac:AdaWAC",
    "allora": "adapters.weights.allora:ALLoRAMethod",
    "apg": "adapters.generation.apg:APG",
    "bang": "adapters.robustness.bang:BANG",
    "coin": "adapters.weights.coin:CoIN",
    "compander": "adapters.objectives.compander:CompandedNetwork",
    "dct_adamw": "adapters.optimizers.dct_adamw:DCTAdamW",
    "diffora": "adapters.weights.diffora:DiffoRA",
    "eata": "adapters.robustness.eata:EATA",
    "eva": "adapters.weights.eva:EVAMethod",
    "exact_augmented_lagrangian": "adapters.solvers.augmented_lagrangian:ExactAugmentedLagrangian",
    "finetune": "adapters.finetune:FullFineTune",
    "frugal": "adapters.optimizers.frugal:FRUGAL",
    "galore": "adapters.optimizers.galore:GaLore",
    "gradnormlorp": "adapters.optimizers.gradnormlorp:GradNormLoRP",
    "hut": "adapters.weights.hut:HUTMethod",
    "layer_adaptive_pruning": "adapters.pruning.rate_distortion:LayerAdaptivePruning",
    "learned_weights": "adapters.objectives.learned_weights:LearnedSampleWeights",
    "lift": "adapters.sparse.lift:LIFT",
    "lora": "adapters.weights.lora:LoRAMethod",
    "lora_sb": "adapters.weights.lora_sb:LoRASBMethod",
    "miss": "adapters.weights.miss:MiSSMethod",
    "network": "adapters.network:Network",
    "peft": "adapters.hf:PeftTune",
    "ps_kd": "adapters.objectives.ps_kd:PSKD",
    "reweighted": "adapters.objectives.reweighted:Reweighted",
    "s2ft": "adapters.sparse.s2ft:S2FT",
    "sara": "adapters.sparse.sara:SaRA",
    "sorsa": "adapters.weights.sorsa:SORSAMethod",
    "sparse_ot": "adapters.solvers.sparse_ot:SparseTransport",
    "svfit": "adapters.weights.svfit:SVFitMethod",
}
"""name -> module:class, imported when it is asked for."""

_registered: dict[str, type[Learner]] = {}

Registrable = TypeVar("Registrable", bound="type[Learner] | type[Method] | type[Iteration]")


def names() -> list[str]:
    """Return the names of all learners."""
    return sorted({*_MODULES, *_registered})


def get(name: str) -> type[Learner]:
    """Return the learner class of a name.

    Raises:
        ValueError: no such learner; the message lists the known ones.
    """
    if name not in _registered:
        if name not in _MODULES:
            raise ValueError(f"unknown learner {name!r}; {did_you_mean(name, names())}")
        module, attribute = _MODULES[name].split(":")
        _registered[name] = as_learner(getattr(import_module(module), attribute))
    return _registered[name]


def describe() -> dict[str, str]:
    """Return one line about each learner."""
    return {name: (inspect.getdoc(get(name)) or "").splitlines()[0] for name in names()}


def register(method: Registrable) -> Registrable:
    """Decorate a `Method`, `Iteration` or `Learner` of your own, so that `get` finds it.

    Raises:
        TypeError: none of these, or without a name, space or docstring.
        ValueError: the name is taken by another class.
    """
    learner = as_learner(method)
    name = learner.name
    taken = name in _MODULES or (
        name in _registered and _source(_registered[name]) != _source(learner)
    )
    if taken:
        raise ValueError(f"there is a learner {name!r} already.")
    _registered[name] = learner
    return method


def as_learner(kind: type[Learner] | type[Method] | type[Iteration]) -> type[Learner]:
    """Return the learner class of a method or iteration, or a learner class as it is."""
    if not isinstance(kind, type) or not issubclass(kind, Learner | Method | Iteration):
        raise TypeError(f"expected a Method, Iteration or Learner class, but got {kind!r}.")
    if issubclass(kind, Iteration):
        return Iterated.of(kind)
    return Trainer.of(kind) if issubclass(kind, Method) else kind


def _source(learner: type[Learner]) -> str:
    kind: type = learner
    if issubclass(learner, Trainer):
        kind = learner.method_type
    elif issubclass(learner, Iterated):
        kind = learner.kind
    return f"{kind.__module__}.{kind.__qualname__}"
