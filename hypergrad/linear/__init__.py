"""Linear solvers for A x = b, where A is known only by its products with vectors.

A solver is a frozen config with one method, `LinearSolver.solve`.  It always says how good
its answer is: a relative residual, the number of products, and a `hypergrad.Status`.
"""

from hypergrad.linear.cg import CG
from hypergrad.linear.direct import Direct
from hypergrad.linear.identity import Identity
from hypergrad.linear.neumann import Neumann
from hypergrad.linear.solution import LinearSolver, Matvec, Solution

__all__ = ["CG", "Direct", "Identity", "LinearSolver", "Matvec", "Neumann", "Solution"]
