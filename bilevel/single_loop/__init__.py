"""Stochastic bilevel algorithms: weights, adjoint and hyperparameters move by minibatches.

Eleven published algorithms as compositions of four parts:

    directions     d_w, d_v, d_z on one sample of batches; hypergradients by Neumann series
    variance       SAGA tables, STORM and SPIDER recursions around any direction
    rates          constant or decreasing step sizes
    finite         inner levels that can list their batches

    ========  =======================  ==================  ===================  =============
    name      inner loop               adjoint             direction of z       needs lists
    ========  =======================  ==================  ===================  =============
    SOBA      one step                 one SGD step        plain                no
    SABA      one step, SAGA           one step, SAGA      SAGA                 yes
    SRBA      one step, SARAH          one step, SARAH     SARAH                yes
    FSLA      one step                 one SGD step        STORM                no
    AmIGO     SGD                      SGD, warm start     plain                no
    StocBiO   SGD                      truncated series    plain                no
    BSA       SGD                      randomized series   plain                no
    TTSA      one step                 randomized series   plain                no
    SUSTAIN   one step, STORM          randomized series   STORM                no
    MRBO      one step, STORM          truncated series    STORM                no
    VRBO      loop, SPIDER             truncated series    SPIDER               yes
    ========  =======================  ==================  ===================  =============
"""

from bilevel.single_loop.base import StochasticBilevel, StochasticState
from bilevel.single_loop.finite import FiniteInner, FiniteSum
from bilevel.single_loop.joint import SABA, SOBA, SRBA
from bilevel.single_loop.nested import BSA, TTSA, AmIGO, StocBiO
from bilevel.single_loop.neumann import Randomized, Truncated
from bilevel.single_loop.rates import Decay, Rate
from bilevel.single_loop.recursive import FSLA, MRBO, SUSTAIN, VRBO

__all__ = [
    "BSA",
    "FSLA",
    "MRBO",
    "SABA",
    "SOBA",
    "SRBA",
    "SUSTAIN",
    "TTSA",
    "VRBO",
    "AmIGO",
    "Decay",
    "FiniteInner",
    "FiniteSum",
    "Randomized",
    "Rate",
    "StocBiO",
    "StochasticBilevel",
    "StochasticState",
    "Truncated",
]
