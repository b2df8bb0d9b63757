"""A planted case: six modules of which two can help."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapters.reparam import Reparam, attach, maps
from adapters.weights import HUT
from bilevel.diffora import DifferentialSearch
from bilevel.selection import Selection

__all__ = ["Planted", "planted"]

D = torch.float64


class Planted(nn.Module):
    """y = Σ_j G_j x_j (A_j B_j) on groups of features; the target uses some groups only."""

    def __init__(self, groups: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.parts = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(groups))
        for part in self.parts:
            nn.init.zeros_(part.weight)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        pieces = zip(self.parts, x.split(4, dim=1), strict=True)
        return torch.stack([part(piece) for part, piece in pieces]).sum(0)


def planted(seed: int, adapter: Reparam, **options: Any) -> tuple[set[str], Selection]:
    """Return the modules that matter, and what was found: 1/3 of six modules.

    Args:
        seed: of the data, the modules that matter, and the start.
        adapter: over which to search.
        **options: of the search; 120 steps by default.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(6, generator=generator)[:2].tolist()
    model = Planted(6, seed)
    if isinstance(adapter, HUT):
        for part in model.parts:
            nn.init.normal_(part.weight, std=0.3)
    base = Planted(6, seed)
    base.load_state_dict(model.state_dict())
    attach(model, adapter)
    x = torch.randn(300, 24, generator=generator, dtype=D)
    with torch.no_grad():
        y = base(x)
        for j in chosen:
            scale = base.parts[j].weight if isinstance(adapter, HUT) else torch.ones(3, 4, dtype=D)
            change = scale * torch.randn(3, 4, generator=generator, dtype=D)
            y = y + x[:, 4 * j : 4 * j + 4] @ change.T
        y = y + 0.3 * torch.randn(y.shape, generator=generator, dtype=D)

    def batch(first: int, step: int) -> tuple[Tensor, Tensor]:
        rows = first + torch.randint(150, (50,), generator=torch.Generator().manual_seed(step))
        return x[rows], y[rows]

    search = DifferentialSearch(
        **{"steps": 120, "warm_up": 10, "lr": 2e-2, "gate_lr": 5e-2, **options}
    )
    names = [f"parts.{j}" for j in range(6)]
    found = search(
        maps(model),
        [names],
        [p for p in model.parameters() if p.requires_grad],
        lambda given: (model(given[0]) - given[1]).square().mean(),
        lambda step: batch(0, step),
        lambda step: batch(150, step + 10_000),
        share=1 / 3,
    )
    return {f"parts.{j}" for j in chosen}, found
