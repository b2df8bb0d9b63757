"""Weight maps W = g(W₀, θ): trained tensors θ in place of the weights of a frozen network.

    from adapters.reparam import attach, merge
    from adapters.weights import LoRA

    attach(model, LoRA(rank=4), targets="encoder.*")   # W₀ is frozen, θ is trained
    ...                                                # train model.parameters() that require grad
    merge(model)                                       # a plain module again, with W in place of W₀

The maps are parametrizations of `torch.nn.utils.parametrize`, so that `torch.func`, double
backward, hypergradients, `state_dict` and `copy.deepcopy` work as on any module.
"""

from adapters.reparam.attach import (
    adaptable,
    attach,
    configured,
    detach,
    maps,
    merge,
    n_trained,
    replaced,
)
from adapters.reparam.base import Parts, Reparam, Start, WeightMap
from adapters.reparam.sharing import share

__all__ = [
    "Parts",
    "Reparam",
    "Start",
    "WeightMap",
    "adaptable",
    "attach",
    "configured",
    "detach",
    "maps",
    "merge",
    "n_trained",
    "replaced",
    "share",
]
