"""Bank intents in six tasks: one set of adapters, or sets chosen by the similarity of instructions.

python -m benchmarks.core.coin_banking     # benchmarks/results/coin_banking.md and .json
"""

# ruff: noqa: E501

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from adapters import tasks
from adapters.networks import MLP
from adapters.reparam import attach
from adapters.tasks.folder import data_file
from adapters.weights import LoRA
from benchmarks.core.sequences import SEEDS, Outcome, Part, TaskSequence, Way, row, run, table
from bilevel.balanced_ema import Fixed, Polynomial, Published

ROOT = Path(__file__).parents[2]
TOPICS = ("top_up", "transfer", "card")
STEPS, LR, RANK, GATE = 150, 3e-3, 8, 0.45


def alike(new: Sequence[str], old: Sequence[str]) -> float:
    """Return the cosine of the summed TF-IDF vectors of two sets of texts."""
    words = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit([*new, *old])
    sums = [np.asarray(words.transform(texts).sum(axis=0)) for texts in (new, old)]
    return float(cosine_similarity(*sums)[0, 0])


WAYS = {
    "one set, fine-tuning": Way(),
    "one set, EMA 0.99": Way(Fixed(0.99)),
    "one set, EMA 0.995": Way(Fixed(0.995)),
    "one set, released, κ = 0.1": Way(Published(0.1)),
    "one set, polynomial 0.2/t": Way(Polynomial(0.2)),
    "gate, fine-tuning": Way(gate=GATE, similar=alike),
    "gate, EMA 0.99": Way(Fixed(0.99), gate=GATE, similar=alike),
    "gate, EMA 0.995": Way(Fixed(0.995), gate=GATE, similar=alike),
    "gate, polynomial 0.2/t": Way(Polynomial(0.2), gate=GATE, similar=alike),
    "a set for each task": Way(gate=1.0, similar=alike),
    "replay, 40 samples a task": Way(replay=40),
    "joint training (oracle)": Way(joint=True),
}


def intents() -> tuple[list[list[str]], list[str], dict[str, list[str]]]:
    """Return the intents of each task, all in the order of their numbers, and their questions.

    Those of a topic (its word is in the name) are dealt to two tasks, the topics in turn.
    """
    path = data_file("text_cls", "banking77_train.csv")
    questions: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            questions.setdefault(line["category"], []).append(line["text"])
    names = sorted(questions)
    topics: list[list[str]] = []
    for topic in TOPICS:
        taken = {name for each in topics for name in each}
        topics.append([n for n in names if topic in n and n not in taken][:14])
    return [topic[half::2] for half in range(2) for topic in topics], names, questions


@cache
def parts(seed: int) -> tuple[list[Part], tuple[Tensor, Tensor]]:
    """Return the six tasks, and the samples of all other intents for the base network."""
    chosen, names, questions = intents()
    splits = tasks.get("banking77", seed=seed, n_train=8000, n_val=1900).splits
    found: list[Part] = []
    for i, each in enumerate(chosen):
        first = found[-1].classes.stop if found else 0
        number = {names.index(name): first + k for k, name in enumerate(each)}
        pairs = []
        for split in ("train", "test"):
            y = splits[split]["y"]
            rows = torch.isin(y, torch.tensor(list(number)))
            pairs.append(
                (splits[split]["x"][rows], torch.tensor([number[c] for c in y[rows].tolist()]))
            )
        texts = tuple(text for name in each for text in questions[name])
        topic = TOPICS[i % len(TOPICS)].replace("_", "-")
        found.append(
            Part(
                f"{topic} {i // len(TOPICS) + 1}",
                pairs[0],
                pairs[1],
                range(first, first + len(each)),
                texts,
            )
        )
    used = torch.tensor([names.index(name) for each in chosen for name in each])
    rest = ~torch.isin(splits["train"]["y"], used)
    return found, (splits["train"]["x"][rest], splits["train"]["y"][rest])


def measure(way: Way, seed: int) -> Outcome:
    """Pretrain, put adapters on and train the sequence once."""
    found, (x, y) = parts(seed)
    sequence = TaskSequence(found)
    torch.manual_seed(seed)
    model = MLP((x.shape[1],), 77, width=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        rows = torch.randint(len(y), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    model.layers[-1] = torch.nn.Linear(128, sequence.masks.shape[1])
    attach(model, LoRA(RANK, scale=2.0), ["layers.0", "layers.1"], train="layers.2.*")
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return run(model, params, sequence, way, steps=STEPS, lr=LR, seed=seed)


def matrix(found: Sequence[Part]) -> str:
    """Return the similarities of all tasks as a Markdown table."""
    lines = ["| new \\ old | " + " | ".join(p.name for p in found) + " |"]
    lines.append("| --- |" + " ---: |" * len(found))
    for new in found:
        cells = [f"{alike(new.instructions, old.instructions):.2f}" for old in found]
        lines.append(f"| {new.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the tables."""
    torch.set_num_threads(1)
    rows, groups = [], {}
    for name, way in WAYS.items():
        found = [measure(way, seed) for seed in SEEDS]
        rows.append(row(name, found, way.joint))
        groups[name] = found[0].groups
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    sequence, base = parts(SEEDS[0])
    sizes = ", ".join(
        f"{p.name} ({len(p.classes)} intents, {len(p.train[1])}/{len(p.test[1])})" for p in sequence
    )
    text = f"""# Bank intents in six tasks: averages, and sets chosen by similarity

`python -m benchmarks.core.coin_banking`: BANKING77, TF-IDF of 1000 words. Tasks in this order, training/test samples in
brackets: {sizes}. A perceptron 1000-128-128 is trained on the {len(base[1])} samples of all other intents and frozen; LoRA of rank
{RANK} on both hidden layers and a new last layer learn each task in {STEPS} steps of 64 samples by AdamW at {LR}, anew for each task.
Multi-head: outputs of other tasks are masked in training and test, so the task is known. The gate sees the training questions of a task
and uses a set of parameters again from a cosine of summed TF-IDF vectors of {GATE} on, which was chosen by the table of
similarities below and not by an accuracy. Averages run from the second task of each set on. Replay: half of each batch
from 40 stored samples of each earlier task. Test accuracy in %, mean ± standard deviation over {len(SEEDS)} seeds.
torch {torch.__version__}, one thread.

"""
    text += table(rows)
    text += f"\nSets that the gate chose: {groups['gate, fine-tuning']}. Similarities:\n\n"
    text += matrix(sequence)
    results = ROOT / "benchmarks" / "results"
    (results / "coin_banking.md").write_text(text)
    (results / "coin_banking.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
