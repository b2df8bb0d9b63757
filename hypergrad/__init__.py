"""Derivatives of nested problems: min_h F(w*(h), h) with w*(h) = argmin_w f(w, h)."""

from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.problem import Loss, ModuleProblem, Problem, module_problem
from hypergrad.status import Status
from hypergrad.views import TwoViewLoss, two_view_grad

__all__ = [
    "Estimator",
    "Hypergradient",
    "Loss",
    "ModuleProblem",
    "Problem",
    "Status",
    "TwoViewLoss",
    "module_problem",
    "two_view_grad",
]
