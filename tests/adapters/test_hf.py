"""HF PEFT as learners, and our own maps against PEFT's on the same weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import Trainer, language, registry, tasks
from adapters.hf import PEFT_METHODS, peft_config
from adapters.reparam import Reparam, adaptable, attach, maps
from adapters.weights import EVA, HUT, AdaLoRA, LoRA, MiSS
from adapters.weights.eva import redistribute

TASK = tasks.get("descriptions", length=16, n_train=64)


def llama() -> Any:
    return language.llama(48).double().eval()


def wrapped(model: nn.Module, config: Any) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def peft_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """PEFT's trained tensors of one layer, by the part of their name that says what they are."""
    found = {}
    for key, value in model.named_parameters():
        if f".{name}." in key and value.requires_grad:
            kind = key.split(f".{name}.")[1].split(".")[0]
            found[kind] = value
    return found


def hira() -> Any:
    import peft

    return peft.HiraConfig(r=4, target_modules=["q_proj", "down_proj"])


PAIRS: dict[str, tuple[Any, Reparam, dict[str, str]]] = {
    "lora": (
        lambda: peft_config("lora", 4, 8, ["q_proj", "down_proj"]),
        LoRA(4, scale=2.0),
        {"A": "lora_A", "B": "lora_B"},
    ),
    "miss": (
        lambda: peft_config("miss", 4, 1, ["q_proj", "down_proj"]),
        MiSS(4),
        {"D": "miss_block"},
    ),
    "bat": (
        lambda: peft_config("bat", 4, 1, ["q_proj", "down_proj"]),
        MiSS(4, "bat"),
        {"D": "miss_block"},
    ),
    "adalora": (
        lambda: peft_config("adalora", 4, 12, ["q_proj", "down_proj"], total_step=100),
        AdaLoRA(6, alpha=12.0, std=0.0),
        {"P": "lora_B", "lam": "lora_E", "Q": "lora_A"},
    ),
    "hira": (hira, HUT(4, std=0.0), {"A": "hira_B", "B": "hira_A"}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_ours_and_pefts_are_the_same_function(name: str) -> None:
    config, reparam, names = PAIRS[name]
    base, x = llama(), torch.randint(48, (3, 10))
    theirs, ours = wrapped(copy.deepcopy(base), config()), copy.deepcopy(base)
    made = attach(ours, reparam, ["*q_proj", "*down_proj"])
    assert len(made) == 4
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if value.requires_grad and "ranknum" not in key:
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(0.2 * noise.to(value.dtype))
        for layer, each in made.items():
            given = peft_tensors(theirs, layer)
            for mine, peft_name in names.items():
                target = each.parts[mine]
                target.copy_(given[peft_name].reshape(target.shape))
    expected = theirs(input_ids=x).logits
    assert not torch.allclose(expected, base(input_ids=x).logits, atol=1e-3)
    tolerance = 1e-4 if name == "adalora" else 1e-6  # PEFT divides alpha by r + 1e-5
    assert torch.allclose(ours(input_ids=x).logits, expected, atol=tolerance)
    assert len(maps(ours)) == 4


@pytest.mark.parametrize(("rho", "tolerance"), [(1.0, 0.05), (2.0, 0.01)])
def test_evas_ranks_and_directions_are_those_of_peft(rho: float, tolerance: float) -> None:
    """Ours is exact; PEFT keeps round(ρ r) components between batches, so it is off a little."""
    import peft

    base, names = llama(), ["q_proj", "down_proj"]
    x = torch.randint(48, (6, 20), generator=torch.Generator().manual_seed(2))
    config = peft.LoraConfig(
        r=4, init_lora_weights="eva", target_modules=names, eva_config=peft.EvaConfig(rho=rho)
    )
    theirs = wrapped(copy.deepcopy(base), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.initialize_lora_eva_weights(
            theirs,
            [{"input_ids": x}] * 3,
            forward_fn=lambda m, batch: m(input_ids=batch["input_ids"]),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda given, *_: given[0].reshape(-1, given[0].shape[-1]),
            show_progress_bar=False,
        )
    targets = [n for n in adaptable(base) if n.endswith(tuple(names))]
    ranks = redistribute(base, EVA(4), targets, lambda m: m(input_ids=x).logits, headroom=rho)
    made = attach(base, ranks, calibrate=lambda m: m(input_ids=x).logits)
    assert sum(each.rank for each in ranks.values()) == 16
    for name, each in made.items():
        a = peft_tensors(theirs, name)["lora_A"].double()
        ours = each.parts["V"]
        assert a.shape == ours.shape
        assert torch.allclose((a @ ours.T).abs(), torch.eye(len(a), dtype=a.dtype), atol=tolerance)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_every_method_starts_at_the_network_trains_and_merges(method: str) -> None:
    plain = registry.get("peft")()
    plain.setup(TASK, {"method": "lora", "rank": 2}, seed=0)
    before = plain.evaluate("val")["loss"]
    learner = registry.get("peft")()
    assert isinstance(learner, Trainer)
    learner.setup(TASK, {"method": method, "rank": 2, "total": 24, "warm_up": 0.1}, seed=0)
    assert learner.evaluate("val")["loss"] == pytest.approx(before, rel=1e-5)
    for _ in range(4):
        metrics = learner.step()
    assert metrics.status.finished is False
    after = learner.evaluate("val")["loss"]
    merged = learner.module()
    assert not any("lora" in n or "miss" in n for n, _ in merged.named_parameters())
    data = TASK.split("val")
    with torch.no_grad():
        loss = TASK.measure(merged(data["x"]), data)["loss"].mean()
    assert float(loss) == pytest.approx(after, rel=1e-4)


def test_adaloras_budget_falls_as_peft_schedules_it() -> None:
    learner = registry.get("peft")()
    assert isinstance(learner, Trainer)
    values = {"method": "adalora", "rank": 2, "total": 16, "warm_up": 0.1, "lr": 1e-2}
    learner.setup(TASK, values, seed=0)
    live = []
    for _ in range(14):
        learner.step()
        e = torch.cat([v.flatten() for n, v in learner.params.items() if "lora_E" in n])
        live.append(int((e != 0).sum()))
    assert live[0] == 3 * 14, "14 layers of rank 3 at the start"
    assert not any("ranknum" in name for name in learner.params), "PEFT marks it as trained"
    assert live[-1] <= 2 * 14


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="method must be one of"):
        peft_config("bone", 4, 8, "all-linear")
    with pytest.raises(ValueError, match="rank must be at least 1, but got 0"):
        peft_config("lora", 0, 8, "all-linear")
    with pytest.raises(ValueError, match="needs a task of type Sequences"):
        registry.get("peft")().setup(tasks.get("digits"), {}, seed=0)
