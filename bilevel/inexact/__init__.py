"""Inexact outer algorithms with certificates: MAID, fixed-accuracy Armijo, HOAG and ISGD.

samples, problems     inner levels that carry constants; averages over samples
charts                coordinates: unconstrained, or a box with projection
level                 counted derivatives of both losses
constants, probes     smoothness constants, given or estimated
solvers, adjoint      lower-level solvers and conjugate gradients, stopped at an accuracy
bounds                the inequalities
hypergradient         an inexact hypergradient with its bound, and an estimate of its error
maid, hoag, isgd      the outer algorithms
"""

from bilevel.inexact.armijo import FixedAccuracy
from bilevel.inexact.base import InexactAlgorithm, InexactState
from bilevel.inexact.constants import Constants, NotStronglyConvexError, Smoothness
from bilevel.inexact.hoag import HOAG, Geometric
from bilevel.inexact.hypergradient import (
    InexactHypergradient,
    Tools,
    estimate_error,
    inexact_hypergradient,
)
from bilevel.inexact.isgd import ISGD
from bilevel.inexact.maid import MAID
from bilevel.inexact.problems import (
    dct_filters,
    field_of_experts,
    logistic_ridge,
    psnr,
    quadratic,
    tv_denoising,
)
from bilevel.inexact.samples import SampleProblem, SmoothInner, sample_problem
from bilevel.inexact.solvers import FISTA, LBFGS, GradientDescent, LowerSolver, NewtonCG

__all__ = [
    "FISTA",
    "HOAG",
    "ISGD",
    "LBFGS",
    "MAID",
    "Constants",
    "FixedAccuracy",
    "Geometric",
    "GradientDescent",
    "InexactAlgorithm",
    "InexactHypergradient",
    "InexactState",
    "LowerSolver",
    "NewtonCG",
    "NotStronglyConvexError",
    "SampleProblem",
    "SmoothInner",
    "Smoothness",
    "Tools",
    "dct_filters",
    "estimate_error",
    "field_of_experts",
    "inexact_hypergradient",
    "logistic_ridge",
    "psnr",
    "quadratic",
    "sample_problem",
    "tv_denoising",
]
