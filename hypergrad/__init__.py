"""Derivatives of nested problems: min_h F(w*(h), h) with w*(h) = argmin_w f(w, h)."""

from hypergrad.check import check_hypergradient
from hypergrad.compiled.report import CompileReport
from hypergrad.conditioning import AdamConditioning, adam_conditioning
from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.explicit import Explicit
from hypergrad.f2sa import F2SA
from hypergrad.finite import FiniteDifference
from hypergrad.fixed_point import FixedPoint, FixedPointResult
from hypergrad.forward import Forward
from hypergrad.higher_unrolled import HigherUnrolled
from hypergrad.implicit import Implicit
from hypergrad.linear import (
    CG,
    GMRES,
    MINRES,
    Direct,
    Identity,
    LinearSolver,
    Neumann,
    Nystrom,
    Solution,
)
from hypergrad.operators import GGN, Curvature, Hessian
from hypergrad.optimizers import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Hyper,
    Lion,
    Optimizer,
    RMSprop,
    TorchOpt,
    from_torch,
)
from hypergrad.problem import Loss, ModuleProblem, Problem, module_problem
from hypergrad.proximal import (
    group_soft_threshold,
    project_box,
    project_simplex,
    soft_threshold,
)
from hypergrad.proximal_gradient import ProximalGradient
from hypergrad.randomness import seeded
from hypergrad.report import HypergradientReport
from hypergrad.sama import SAMA
from hypergrad.solver import Solver
from hypergrad.status import Status
from hypergrad.training import Trained, train
from hypergrad.unrolled import Unrolled
from hypergrad.value_function import BOME, PBGD
from hypergrad.views import TwoViewLoss, two_view_grad
from hypergrad.zeroth_order import PZOBO

__all__ = [
    "BOME",
    "CG",
    "F2SA",
    "GGN",
    "GMRES",
    "MINRES",
    "PBGD",
    "PZOBO",
    "SAMA",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamConditioning",
    "AdamW",
    "CompileReport",
    "Curvature",
    "Direct",
    "Estimator",
    "Explicit",
    "FiniteDifference",
    "FixedPoint",
    "FixedPointResult",
    "Forward",
    "Hessian",
    "HigherUnrolled",
    "Hyper",
    "Hypergradient",
    "HypergradientReport",
    "Identity",
    "Implicit",
    "LinearSolver",
    "Lion",
    "Loss",
    "ModuleProblem",
    "Neumann",
    "Nystrom",
    "Optimizer",
    "Problem",
    "ProximalGradient",
    "RMSprop",
    "Solution",
    "Solver",
    "Status",
    "TorchOpt",
    "Trained",
    "TwoViewLoss",
    "Unrolled",
    "adam_conditioning",
    "check_hypergradient",
    "from_torch",
    "group_soft_threshold",
    "module_problem",
    "project_box",
    "project_simplex",
    "seeded",
    "soft_threshold",
    "train",
    "two_view_grad",
]
