"""Seven regularizers of a character-level LSTM, as on PTB in the paper, at small scale.

    BILEVEL_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.self_tuning.language [steps [seeds]]

Tiny Shakespeare: the first 60,000 characters for training, 20,000 each for validation and test.
Two LSTM layers of 96 units; windows of 40 characters, 20 at a time, Adam 3e-3.  Rates of dropout of
the input, between layers and of the output, of embedding rows and of hidden-to-hidden weights; AR
and TAR penalties.  Losses in nats per character.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.self_tuning.report import figure, write
from benchmarks.self_tuning.search import compare, draw_schedules, losses_table
from bilevel import Grad, ModuleInner, SelfTuning, Space
from bilevel.self_tuning import LockedDropout, activation_penalty, temporal_penalty
from hypergrad import Adam

TRAIN, HELD_OUT, WINDOW, BATCH, WIDTH = 60_000, 20_000, 40, 20, 96


def rate(doc: str) -> Grad:
    return Grad(0.05, low=0.0, high=0.9, doc=doc)


SPACE = Space(
    p_input=rate("dropout of embedded characters"),
    p_hidden=rate("dropout between the layers"),
    p_output=rate("dropout of the outputs"),
    p_embed=rate("dropout of embedding rows"),
    p_weight=rate("DropConnect of hidden-to-hidden weights"),
    alpha=Grad(0.05, low=1e-3, high=10.0, scale="log", doc="AR"),
    beta=Grad(0.05, low=1e-3, high=10.0, scale="log", doc="TAR"),
)
HIGH = {n: 0.5 for n in SPACE if n.startswith("p_")} | {"alpha": 1.0, "beta": 1.0}


class Model(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, 48)
        self.drop_in = LockedDropout(0.1)
        self.lstm = nn.LSTM(48, WIDTH, 2, batch_first=True)
        self.drop_out = LockedDropout(0.1)
        self.out = nn.Linear(WIDTH, characters)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, and the outputs of the last layer with and without dropout."""
        raw = self.lstm(self.drop_in(self.embed(x)))[0]
        kept = self.drop_out(raw)
        return self.out(kept), kept, raw


def text() -> tuple[Tensor, Tensor, Tensor, int]:
    folder = os.environ.get("BILEVEL_DATA")
    if folder is None:
        raise SystemExit("set BILEVEL_DATA to the folder that holds text_lm/tinyshakespeare.txt")
    raw = (Path(folder) / "text_lm" / "tinyshakespeare.txt").read_text()
    known = {c: i for i, c in enumerate(sorted(set(raw)))}
    codes = torch.tensor([known[c] for c in raw[: TRAIN + 2 * HELD_OUT]])
    train, rest = codes[:TRAIN], codes[TRAIN:]
    return train, rest[:HELD_OUT], rest[HELD_OUT:], len(known)


def windows(codes: Tensor) -> dict[str, Tensor]:
    """Neighboring windows, one a row, and the characters that follow."""
    count = (len(codes) - 1) // WINDOW
    x = codes[: count * WINDOW].view(count, WINDOW)
    return {"x": x, "y": codes[1 : count * WINDOW + 1].view(count, WINDOW)}


def per_window(outputs: tuple[Tensor, Tensor, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs[0].transpose(1, 2), batch["y"], reduction="none").mean(1)


def loss(outputs: tuple[Tensor, Tensor, Tensor], values: Mapping[str, Any], batch: Any) -> Tensor:
    penalties = values["alpha"] * activation_penalty(outputs[1])
    penalties = penalties + values["beta"] * temporal_penalty(outputs[2])
    return per_window(outputs, batch) + penalties


def make(hparams: Mapping[str, Any], seed: int) -> ModuleInner:
    codes, val, test, characters = text()
    torch.manual_seed(seed)

    def batch(t: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed((seed << 32) + t)
        starts = torch.randint(TRAIN - WINDOW - 1, (BATCH, 1), generator=generator)
        at = starts + torch.arange(WINDOW)
        return {"x": codes[at], "y": codes[at + 1]}

    return ModuleInner(
        Model(characters), SPACE, predict=lambda m, values, b: m(b["x"]), loss=loss,
        outer_loss=per_window, train=batch, val=windows(val), test=windows(test),
        val_batch_size=BATCH, hparams=hparams, optimizer=Adam(lr=3e-3), seed=seed,
        dropout={"drop_in": "p_input", "lstm": "p_hidden", "drop_out": "p_output"},
        dropconnect={"embed": "p_embed", "lstm": "p_weight"}, per_batch=["p_embed", "p_weight"],
    )  # fmt: skip


def main(steps: int, seeds: int) -> None:
    torch.set_num_threads(1)
    algorithms = {
        title: SelfTuning(
            mode=mode, lr=0.03, sigma_lr=0.01, warmup=steps // 10, train_steps=5,
            response_optimizer=Adam(lr=3e-3),
        )
        for title, mode in (("STN", "stn"), ("Δ-STN", "delta"))
    }  # fmt: skip
    starts: dict[str, dict[str, float]] = {"": {}, " from high values": HIGH}
    found, results = compare(make, SPACE, algorithms, starts, steps, seeds)
    draw_schedules(results, SPACE, figure("stn_language"))
    write(
        "self_tuning_language",
        f"""# Seven regularizers of a character-level LSTM

Command: `OMP_NUM_THREADS=1 python -m benchmarks.self_tuning.language {steps} {seeds}`.
torch {torch.__version__}, float32, one thread.
{" ".join((__doc__ or "").split("[seeds]]")[1].split())}
{seeds} seeds, {steps} steps for a self-tuned or single run; each search has {3 * steps} steps in
all, what a Δ-STN run costs; its first trial has the defaults. PBT is an own short implementation
(`search.population`). The lowest validation loss of 20 looks, and the test loss there.

{losses_table(found)}

Figure: `docs/figures/stn_language.png`.
""",
    )


if __name__ == "__main__":
    given = [int(v) for v in sys.argv[1:]]
    main(*(given + [1500, 3][len(given) :]))
