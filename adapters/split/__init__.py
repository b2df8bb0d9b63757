"""The split optimizer: an update rule in a subspace, and a rule without state outside.

One class is GaLore, FRUGAL, BAdam, GradNormLoRP, DCT-AdamW, LIFT, SaRA and S2FT; what differs is
the projector, the remainder, when the subspace is refreshed, and what becomes of the moments then.
"""

from adapters.split.basis import Basis, dct_matrix
from adapters.split.coordinates import Blocks, Coordinates, Fixed, Slices
from adapters.split.layout import Part, Projector, Support
from adapters.split.optimizer import Split
from adapters.split.torch_optimizer import SplitOptimizer

__all__ = [
    "Basis",
    "Blocks",
    "Coordinates",
    "Fixed",
    "Part",
    "Projector",
    "Slices",
    "Split",
    "SplitOptimizer",
    "Support",
    "dct_matrix",
]
