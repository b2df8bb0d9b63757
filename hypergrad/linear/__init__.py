"""Linear solvers for A x = b, where A is known only by its products with vectors.

A solver is a frozen config with one method, `LinearSolver.solve`, and `solve_many` for several
right-hand sides.  It always says how good its answer is: a relative residual, the number of
products, and a `hypergrad.Status`.

| A | solver |
| --- | --- |
| symmetric positive definite | `CG`, with a `Nystrom` preconditioner where it needs many products |
| symmetric indefinite | `MINRES` |
| no symmetry | `GMRES`, or `Neumann` where I − ηA contracts |
| small | `Direct` |
"""

from hypergrad.linear.cg import CG
from hypergrad.linear.direct import Direct
from hypergrad.linear.gmres import GMRES
from hypergrad.linear.identity import Identity
from hypergrad.linear.iterative import Iterative
from hypergrad.linear.minres import MINRES
from hypergrad.linear.neumann import Neumann
from hypergrad.linear.nystrom import Nystrom
from hypergrad.linear.solution import LinearSolver, Matvec, Memory, Solution

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "Direct",
    "Identity",
    "Iterative",
    "LinearSolver",
    "Matvec",
    "Memory",
    "Neumann",
    "Nystrom",
    "Solution",
]
