"""Ways to choose modules at equal trained parameters, and what each reaches on a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adapters.reparam import Reparam, attach, maps, n_trained
from adapters.weights import LoRA
from benchmarks.core.diffora_cases import Case, Data, loss, score
from bilevel.diffora import DifferentialSearch
from bilevel.selection import Selection, discretize

__all__ = ["RANK", "SHARES", "run_case"]

RANK, SCALE = 6, 2.0
SHARES = (1 / 6, 1 / 2)
SEARCHES: dict[str, dict[str, Any]] = {
    "DiffoRA, softmax rows": {},
    "DiffoRA, softmax rows, one-step response": {"hypergradient": "finite_difference"},
    "DiffoRA, sigmoid": {"relaxation": "sigmoid"},
    "DiffoRA, softmax rows, SGD": {"gate_rule": "sgd", "gate_lr": 1.0},
    "DiffoRA, sigmoid, SGD": {"relaxation": "sigmoid", "gate_rule": "sgd", "gate_lr": 1.0},
    "score at G = 1": {"hypergradient": "score"},
}


def run_case(
    make: Callable[[int], Case], seeds: list[int], draws: int, oracle: bool
) -> dict[str, Any]:
    """Measure every way; see `ways` for their names.

    Args:
        make: the case of a seed.
        seeds: each with its own split, network and draws.
        draws: random selections for each seed.
        oracle: whether to rank modules by the test loss that each reaches alone.

    Returns:
        "runs": one entry for each way, share, seed and draw; "history": α of the first seed.
    """
    runs: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for seed in seeds:
        case = make(seed)
        test = dict(zip(("loss", "accuracy"), score(case.base, case.test), strict=True))
        runs.append({"way": "not adapted", "share": None, "seed": seed, "parameters": 0, **test})
        sizes = sizes_of(case)
        scored, found = ways(case, seed, draws, oracle)
        if not first:
            first = {
                "rows": case.rows,
                "alpha": found.history[4::5].tolist(),
                "chosen": discretize(found.logits, SHARES[0], "budget", sizes).tolist(),
            }
        for share in SHARES:
            for way, scores in scored:
                scope = "row" if way.endswith("K a row") else "budget"
                mask = discretize(scores, share, scope, sizes).flatten().tolist()
                names = [name for name, kept in zip(case.names, mask, strict=True) if kept]
                found_ = adapt(case, dict.fromkeys(names, LoRA(RANK, SCALE)), seed)
                runs.append({"way": way, "share": share, "seed": seed, "modules": names, **found_})
            low = dict.fromkeys(case.names, LoRA(round(share * RANK), SCALE))
            way = f"rank {RANK} ρ on all"
            runs.append({"way": way, "share": share, "seed": seed, **adapt(case, low, seed)})
            print(seed, share, flush=True)
        every = adapt(case, dict.fromkeys(case.names, LoRA(RANK, SCALE)), seed)
        runs.append({"way": f"rank {RANK} on all", "share": None, "seed": seed, **every})
    return {"runs": runs, "history": first}


def sizes_of(case: Case) -> Tensor:
    """Parameters of each module's adapter."""
    model = case.fresh()
    found = attach(model, dict.fromkeys(case.names, LoRA(RANK, SCALE)))
    sizes = [[sum(p.numel() for p in found[n].parameters()) for n in row] for row in case.rows]
    return torch.tensor(sizes, dtype=torch.float64)


def ways(
    case: Case, seed: int, draws: int, oracle: bool
) -> tuple[list[tuple[str, Tensor]], Selection]:
    """Return the scores of every way, shape (layers, modules) each, and the first search."""
    shape = (len(case.rows), len(case.rows[0]))
    searched = {way: search(case, seed, **options) for way, options in SEARCHES.items()}
    first = next(iter(searched.values()))
    found = [(way, selection.logits) for way, selection in searched.items()]
    found.append(("DiffoRA, softmax rows, K a row", first.logits))
    found.append(("DiffoRA reversed", -first.logits))
    generator = torch.Generator().manual_seed(1000 + seed)
    found += [("random", torch.rand(shape, generator=generator)) for _ in range(draws)]
    model = case.fresh()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss(model, _sample(case.halves()[0], 64, seed)).backward()
    weights = [model.get_parameter(f"{name}.weight") for name in case.names]
    grads = [float(w.grad.norm()) for w in weights if w.grad is not None]
    found.append(("gradient norm", torch.tensor(grads).view(shape)))
    rms = [float(w.detach().square().mean().sqrt()) for w in weights]
    found.append(("weight norm", torch.tensor(rms).view(shape)))
    found.append(("ablation", ablation(case, seed).view(shape)))
    if oracle:
        alone = [
            -adapt(case, {name: LoRA(RANK, SCALE)}, seed, case.rates[:1])["loss"]
            for name in case.names
        ]
        found.append(("oracle: best modules alone", torch.tensor(alone).view(shape)))
    return found, first


def search(case: Case, seed: int, **options: Any) -> Selection:
    """Search on the two halves of the training samples."""
    torch.manual_seed(seed)
    model = case.fresh()
    attach(model, dict.fromkeys(case.names, LoRA(RANK, SCALE)), train=case.head)
    one, two = case.halves()
    return DifferentialSearch(steps=case.search_steps, **options)(
        maps(model),
        case.rows,
        [p for p in model.parameters() if p.requires_grad],
        lambda data: loss(model, data),
        lambda step: _sample(one, case.batch, 2 * step),
        lambda step: _sample(two, case.batch, 2 * step + 1),
        share=1.0,
    )


def ablation(case: Case, seed: int) -> Tensor:
    """Train all adapters on a half; how much the other half's loss rises without each."""
    torch.manual_seed(seed)
    model = case.fresh()
    found = attach(model, dict.fromkeys(case.names, LoRA(RANK, SCALE)), train=case.head)
    one, two = case.halves()
    _train(model, one, case.batch, case.search_steps, 5e-3)
    sample = _sample(two, 64, seed)
    rises = []
    with torch.no_grad():
        for each in (found[name] for name in case.names):
            each.gate = 0.0
            rises.append(float(loss(model, sample)))
            each.gate = 1.0
    return torch.tensor(rises)


def adapt(
    case: Case, chosen: dict[str, Reparam], seed: int, rates: tuple[float, ...] = ()
) -> dict[str, Any]:
    """Adapt modules on all training samples; the learning rate is chosen by validation loss."""
    best: dict[str, Any] = {}
    for rate in rates or case.rates:
        torch.manual_seed(seed)
        model = case.fresh()
        attach(model, chosen, train=case.head)
        _train(model, case.train, case.batch, case.tune_steps, rate)
        val = score(model, case.val)[0]
        if not best or val < best["val"]:
            test = dict(zip(("loss", "accuracy"), score(model, case.test), strict=True))
            best = {"parameters": n_trained(model), "rate": rate, "val": val, **test}
    return best


def _train(model: nn.Module, data: Data, batch: int, steps: int, rate: float) -> None:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss(model, _sample(data, batch, step)).backward()
        optimizer.step()


def _sample(data: Data, size: int, seed: int) -> Data:
    rows = torch.randint(len(data[1]), (size,), generator=torch.Generator().manual_seed(seed))
    return data[0][rows], data[1][rows]
