"""A training step with our weight maps against HF PEFT's: time and memory, on a small Llama.

python -m benchmarks.methods.against_peft      # writes benchmarks/results/against_peft.md
"""

# ruff: noqa: E501

from __future__ import annotations

import copy
import os
import platform
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.hf import peft_config
from adapters.reparam import Reparam, attach, n_trained
from adapters.weights import HUT, AdaLoRA, LoRA, MiSS
from benchmarks.hypergrad.measure import forked, interleaved, peak_growth

ROOT = Path(__file__).parents[2]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS, LENGTH, REPEATS = 8, 64, 9


def llama() -> Any:
    """A Llama of width 256 and 4 layers, randomly initialized."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def ours(reparam: Reparam) -> nn.Module:
    """Return the model with our maps."""
    model: nn.Module = llama()
    attach(model, reparam, [f"*{name}" for name in TARGETS])
    return model


def theirs(config: Any) -> nn.Module:
    """Return the model with PEFT's layers."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = peft.get_peft_model(llama(), config)
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False)
    return model


def stepper(model: nn.Module) -> Callable[[], None]:
    """Return a function that takes a training step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        optimizer.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, 512), ids[:, 1:].flatten()
        ).backward()
        optimizer.step()

    return step


def hira() -> Any:
    import peft

    return peft.HiraConfig(r=8, target_modules=TARGETS)


PAIRS: dict[str, tuple[Reparam, Callable[[], Any]]] = {
    "LoRA r8": (LoRA(8, scale=2.0), lambda: peft_config("lora", 8, 16, TARGETS)),
    "MiSS r8": (MiSS(8), lambda: peft_config("miss", 8, 1, TARGETS)),
    "Bat r8": (MiSS(8, "bat"), lambda: peft_config("bat", 8, 1, TARGETS)),
    "AdaLoRA r12": (
        AdaLoRA(12, alpha=24.0),
        lambda: peft_config("adalora", 8, 24, TARGETS, total_step=1000),
    ),
    "HUT r8 (PEFT: HiRA)": (HUT(8), hira),
}


def memory(make: Callable[[], nn.Module]) -> float:
    """Peak memory of two steps over one forward pass of the plain model, in MB."""

    def measured() -> float:
        plain = llama()
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)

        def forward() -> None:
            with torch.no_grad():
                plain(input_ids=ids, use_cache=False)

        def train() -> None:
            step = stepper(make())
            step(), step()

        return peak_growth(forward, train)[0]

    return float(forked(measured))


def main() -> None:
    """Measure, print and write the page."""
    torch.set_num_threads(1)
    rows = []
    full = llama()
    for name, (reparam, config) in PAIRS.items():
        one, two = ours(reparam), theirs(config())
        steps = {"full": stepper(copy.deepcopy(full)), "ours": stepper(one), "PEFT": stepper(two)}
        times = interleaved(steps, REPEATS, warm_ups=2)
        ms = {k: statistics.median(v) * 1e3 for k, v in times.items()}
        mb = {
            "ours": memory(lambda r=reparam: ours(r)),
            "PEFT": memory(lambda c=config: theirs(c())),
        }
        rows.append(
            f"| {name} | {n_trained(one):,} / {n_trained(two):,} | {ms['full']:.0f} | "
            f"{ms['ours']:.0f} | {ms['PEFT']:.0f} | **{ms['ours'] / ms['PEFT']:.2f}** | "
            f"{mb['ours']:.0f} / {mb['PEFT']:.0f} |"
        )
        print(rows[-1], flush=True)
    import peft
    import transformers

    text = f"""# A training step: our weight maps against HF PEFT

`python -m benchmarks.methods.against_peft`: a Llama of width 256, 4 layers, adapters on all seven projections, {ROWS} ×
{LENGTH} tokens, AdamW, float32, one thread. CPU time of a step in ms, medians of {REPEATS} interleaved repeats; memory is the growth of
the peak over the plain model's forward pass, in MB, in a forked process. torch {torch.__version__}, peft {peft.__version__}, transformers
{transformers.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}.

| method | trained, ours / PEFT | full fine-tuning | ours | PEFT | ours / PEFT | MB, ours / PEFT |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
""" + "\n".join(rows)
    note = """

Our maps build W once a step and do one product a layer, and the backward pass takes the gradient of the whole weight before
it reaches the factors. PEFT's LoRA and MiSS are branches beside the frozen weight, which need no such gradient: that is the
difference. Maps that are no branches (Bat, HUT) cost PEFT a weight a step, too. What the weight form buys: any map, any layer,
`torch.func`, double backward and `higher`.
"""
    (ROOT / "benchmarks" / "results" / "against_peft.md").write_text(text + note)


if __name__ == "__main__":
    main()
