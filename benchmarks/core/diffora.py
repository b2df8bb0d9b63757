"""Selection of modules by DiffoRA: a planted case, a digits transformer, and stories260K.

python -m benchmarks.core.diffora [planted] [rotated] [shifted] [stories]
python -m benchmarks.core.diffora page     # results/diffora.md and docs/figures/diffora.png anew

Each part goes to benchmarks/results/diffora.json; the page is written from there.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from adapters.weights import HUT, LoRA
from benchmarks.core.diffora_cases import CASES
from benchmarks.core.diffora_page import draw, page
from benchmarks.core.diffora_planted import planted
from benchmarks.core.diffora_studies import run_case

RESULTS = Path(__file__).parents[1] / "results"
SEEDS = {"rotated": 5, "shifted": 5, "stories": 3}
WAYS: dict[str, dict[str, Any]] = {
    "softmax rows, first order": {},
    "softmax rows, finite difference": {"hypergradient": "finite_difference"},
    "sigmoid, first order": {"relaxation": "sigmoid"},
    "score at G = 1": {"hypergradient": "score"},
    "softmax rows, 20 steps": {"steps": 20},
    "softmax rows, 1000 steps": {"steps": 1000},
}


def recalls() -> dict[str, dict[str, float]]:
    """Share of the planted modules that is found, mean of ten seeds."""
    found: dict[str, dict[str, float]] = {}
    for way, options in WAYS.items():
        found[way] = {}
        for name, adapter in (("LoRA r2", LoRA(2)), ("HUT r2", HUT(2, std=0.5))):
            pairs = [planted(seed, adapter, **options) for seed in range(10)]
            recall = [len(wanted & set(got.names)) / len(wanted) for wanted, got in pairs]
            found[way][name] = statistics.fmean(recall)
        print(way, found[way], flush=True)
    return found


def main(parts: list[str]) -> None:
    """Measure parts, and write the page and the picture."""
    torch.set_num_threads(1)
    path = RESULTS / "diffora.json"
    for part in parts or ["planted", *CASES]:
        if part == "page":
            continue
        if part == "planted":
            found: Any = recalls()
        else:
            random = 3 if part == "stories" else 5
            seeds = list(range(SEEDS[part]))
            found = run_case(CASES[part], seeds, random, oracle=part != "stories")
        stored = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**stored, part: found, "torch": torch.__version__}))
    stored = json.loads(path.read_text())
    (RESULTS / "diffora.md").write_text(page(stored))
    draw(stored)


if __name__ == "__main__":
    main(sys.argv[1:])
