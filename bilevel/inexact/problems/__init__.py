"""Nested problems with their smoothness constants, as inner levels that `tune` takes."""

from bilevel.inexact.problems.experts import dct_filters, field_of_experts
from bilevel.inexact.problems.logistic import logistic_ridge
from bilevel.inexact.problems.quadratic import quadratic
from bilevel.inexact.problems.variation import psnr, tv_denoising

__all__ = [
    "dct_filters",
    "field_of_experts",
    "logistic_ridge",
    "psnr",
    "quadratic",
    "tv_denoising",
]
