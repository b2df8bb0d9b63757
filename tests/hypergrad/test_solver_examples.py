"""The programs in examples/ do what they say, and those of the guide are as short as it says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_per_parameter_decay_beats_the_best_single_one() -> None:
    found = load("per_parameter_decay").main(outer_steps=3)
    assert found["one per parameter"] < found["one decay"]


def test_hyper_cleaning_finds_the_wrong_labels() -> None:
    found = load("hyper_cleaning").main(outer_steps=8)
    assert found["accuracy after"] > found["accuracy before"]
    assert min(found["wrong labels found"], found["right labels kept"]) > 0.9


def test_maml_adapts_to_new_tasks() -> None:
    found = load("maml").main(outer_steps=30, tasks_per_step=2)
    assert found["meta-trained"] > found["random initialization"] + 0.05


@pytest.mark.parametrize("title", ["Per-parameter weight decay", "Data hyper-cleaning", "MAML"])
def test_the_guide_needs_eight_lines(title: str) -> None:
    text = (ROOT / "docs" / "hypergradients.md").read_text().split(f"**{title}**")[1]
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    block = next(b for b in blocks if b.startswith("from hypergrad import"))
    assert len([line for line in block.splitlines() if line.strip()]) <= 8
