"""Derivatives of nested problems: min_h F(w*(h), h) with w*(h) = argmin_w f(w, h)."""

from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.optimizers import SGD, Adam, AdamW, Hyper, Optimizer
from hypergrad.problem import Loss, ModuleProblem, Problem, module_problem
from hypergrad.randomness import seeded
from hypergrad.status import Status
from hypergrad.training import Trained, train
from hypergrad.views import TwoViewLoss, two_view_grad

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Estimator",
    "Hyper",
    "Hypergradient",
    "Loss",
    "ModuleProblem",
    "Optimizer",
    "Problem",
    "Status",
    "Trained",
    "TwoViewLoss",
    "module_problem",
    "seeded",
    "train",
    "two_view_grad",
]
