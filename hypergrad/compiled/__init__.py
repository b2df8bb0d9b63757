"""Estimators as compiled graphs: traced by make_fx, compiled by inductor, checked against eager.

Everything here is about speed: a compiled call returns what the eager call returns, up to
rounding, or runs the eager call itself and says why.
"""

from hypergrad.compiled.report import CompileReport

__all__ = ["CompileReport"]
