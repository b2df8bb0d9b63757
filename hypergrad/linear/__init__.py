"""Linear solvers for the adjoint system H q = ∂F/∂w, one a file."""

from hypergrad.linear.cg import CG
from hypergrad.linear.direct import Direct
from hypergrad.linear.identity import Identity
from hypergrad.linear.neumann import Neumann
from hypergrad.linear.solution import LinearSolver, Matvec, Solution

__all__ = ["CG", "Direct", "Identity", "LinearSolver", "Matvec", "Neumann", "Solution"]
