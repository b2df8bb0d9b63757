"""Derivatives of nested problems: min_h F(w*(h), h) with w*(h) = argmin_w f(w, h)."""

from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.problem import Loss, ModuleProblem, Problem, module_problem
from hypergrad.status import Status

__all__ = [
    "Estimator",
    "Hypergradient",
    "Loss",
    "ModuleProblem",
    "Problem",
    "Status",
    "module_problem",
]
