"""Cost of self-tuning in units of a plain training step, and where it goes.

    OMP_NUM_THREADS=1 python -m benchmarks.self_tuning.cost [repeats]

The yardstick is a step of a plain loop: `torch.optim.SGD` with momentum on the plain network.  CPU
time in one thread, minima over interleaved repeats.  Memory: bytes of weights, responses and
optimizer states, and of the tensors that autograd keeps for the backward pass.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.self_tuning.report import table, write
from bilevel import Grad, ModuleInner, SelfTuning, Space
from bilevel.self_tuning.weights import Weights
from bilevel.single_loop.draws import chance
from hypergrad import SGD

BATCH, INNER = 64, 5
SPACE = Space(p=Grad(0.1, low=0.0, high=0.9), q=Grad(0.1, low=0.0, high=0.9))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(65, 64)
        self.drop = nn.Dropout(0.1)
        self.lstm = nn.LSTM(64, 128, 2, batch_first=True)
        self.last = nn.Dropout(0.1)
        self.out = nn.Linear(128, 65)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.last(self.lstm(self.drop(self.embed(x)))[0]))
        return out.transpose(1, 2)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(784, 300), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10),
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, str], tuple[int, ...] | None]] = {
    "perceptron 784-300-300-10": (mlp, {"1": "p", "4": "q"}, (1, 28, 28)),
    "CNN 16-32-64, 28×28": (cnn, {"3": "p", "8": "q"}, (1, 28, 28)),
    "LSTM 2×128, 40 characters": (LSTM, {"drop": "p", "last": "q"}, None),
    "the same without oneDNN": (LSTM, {"drop": "p", "last": "q"}, None),
}
"""Without oneDNN, the plain LSTM does its products by the same general routine as all others."""


def examples(shape: tuple[int, ...] | None) -> dict[str, Tensor]:
    if shape is None:
        return {"x": torch.randint(0, 65, (BATCH, 40)), "y": torch.randint(0, 65, (BATCH, 40))}
    return {"x": torch.randn(BATCH, *shape), "y": torch.randint(0, 10, (BATCH,))}


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    each = F.cross_entropy(outputs, batch["y"], reduction="none")
    return each if each.dim() == 1 else each.mean(1)


class Case:
    """One network, plain and self-tuning."""

    def __init__(self, name: str) -> None:
        make, dropout, shape = NETWORKS[name]
        torch.manual_seed(0)
        self.net, self.batch = make(), examples(shape)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        self.subject = ModuleInner(
            make(), SPACE, loss=lambda out, values, batch: cross_entropy(out, batch),
            outer_loss=cross_entropy, train=[self.batch], val=[examples(shape)],
            test=[self.batch], dropout=dropout, optimizer=SGD(lr=0.01, momentum=0.9),
        )  # fmt: skip
        self.model = self.subject.response_model()
        self.z = self.model.layout.coordinates(self.subject.hparams)

    def plain(self) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.net(self.batch["x"]), self.batch).mean().backward()
        self.optimizer.step()

    def trainer(self, mode: Any, linearized: bool) -> Callable[[], None]:
        """Training steps only, one at a time."""
        weights, sigma = Weights(mode, None), torch.full_like(self.z, 0.5)
        state = [weights.init(self.subject, self.model.initial(mode, torch.Generator()))]

        def run() -> None:
            found = weights.train(
                self.subject, self.model, state[0], self.z, sigma, 1, chance(0, 0),
                linearized=linearized,
            )  # fmt: skip
            state[0] = found.state

        return run

    def outer(self, mode: Any) -> Callable[[], None]:
        """A whole outer step: 5 training steps and one on λ and σ."""
        algorithm = SelfTuning(mode=mode, train_steps=INNER)
        state = [algorithm.init(self.subject)]

        def run() -> None:
            state[0] = algorithm.step(self.subject, state[0])[1]

        return run

    def response(self, how: str) -> Callable[[], None]:
        """The gradient of a linearized response step alone, by three kinds of derivative."""
        generator = torch.Generator().manual_seed(0)
        response = {n: v.requires_grad_() for n, v in self.model.initial("stn", generator).items()}
        params = {n: p.detach() for n, p in self.subject.params.items()}
        shift = 0.5 * torch.randn(BATCH, self.model.layout.size, generator=generator)
        values = self.model.layout.values(self.z + shift)
        objective, wanted = self.subject.objective, list(response.values())

        def outputs(s: Tensor) -> Tensor:
            found: Tensor = objective.outputs(
                {**params, **response}, values, self.batch, 0, training=True, shift=s
            )
            return found

        def carried() -> None:
            loss = objective.training_loss(
                {**params, **response}, values, self.batch, 0, shift=shift, linearized=True
            )
            torch.autograd.grad(loss, wanted)

        def forward_ad() -> None:
            y, tangent = torch.func.jvp(
                lambda t: outputs(t * shift), (torch.zeros(()),), (torch.ones(()),)
            )
            torch.autograd.grad(cross_entropy(y + tangent, self.batch).mean(), wanted)

        def double_backward() -> None:
            t = torch.zeros((), requires_grad=True)
            y = outputs(t * shift)
            v = torch.zeros_like(y, requires_grad=True)
            (pulled,) = torch.autograd.grad(y, t, v, create_graph=True)
            (tangent,) = torch.autograd.grad(pulled, v, create_graph=True)
            torch.autograd.grad(cross_entropy(y + tangent, self.batch).mean(), wanted)

        return {
            "carried": carried, "torch.func.jvp": forward_ad, "double backward": double_backward,
        }[how]  # fmt: skip

    def memory(self, mode: str) -> tuple[int, int]:
        """Bytes of state, and of what one backward pass needs (the largest one of a step)."""
        seen: dict[int, int] = {}

        def keep(t: Tensor) -> Tensor:
            if not t._is_zerotensor():
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        own = sum(p.numel() for p in self.net.parameters())
        if mode == "plain":
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = cross_entropy(self.net(self.batch["x"]), self.batch).mean()
            del loss
            return 8 * own, sum(seen.values())
        generator = torch.Generator().manual_seed(0)
        response = self.model.initial("stn", generator)
        extra = sum(v.numel() for v in response.values())
        for value in response.values():
            value.requires_grad_()
        params = {
            n: p.detach().requires_grad_(mode == "stn") for n, p in self.subject.params.items()
        }
        shift = 0.5 * torch.randn(BATCH, self.model.layout.size)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = self.model.training_loss(
                params, response, shift, self.z + shift, (self.batch, 0), mode == "delta"
            )
        del loss
        return 8 * (own + extra), sum(seen.values())


def measure(
    runs: dict[str, Callable[[], None]],
    repeats: int,
    statistic: Callable[[list[float]], float] = min,
) -> dict[str, float]:
    """Return the least CPU time of each, or another statistic, in seconds; the first is dropped."""
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seen[name].append(time.process_time() - start)
    return {name: statistic(times[1:]) for name, times in seen.items()}


def multiples(case: Case, name: str) -> list[list[str]]:
    """Memory of both modes as multiples of that of plain training."""
    rows, plain = [], case.memory("plain")
    for mode, title in (("stn", "STN"), ("delta", "Δ-STN")):
        state, saved = case.memory(mode)
        parts = state / plain[0], saved / plain[1], (state + saved) / sum(plain)
        rows.append([f"{name}, {title}", *(f"{m:.2f}" for m in parts)])
    return rows


def main(repeats: int) -> None:
    torch.set_num_threads(1)
    steps, parts, jvps, memory = [], [], [], []
    for name in NETWORKS:
        case = Case(name)
        kinds = ("carried", "torch.func.jvp", "double backward")
        if isinstance(case.net, LSTM):
            kinds = ("carried",)  # its time loop carries tangents itself and is differentiated once
        runs = {
            "plain": case.plain,
            "inner": lambda case=case: (case.subject.step(), None)[1],  # type: ignore[misc]
            "stn": case.trainer("stn", False),
            "delta": case.trainer("delta", True),
            "delta, not linearized": case.trainer("delta", False),
            "outer stn": case.outer("stn"),
            "outer delta": case.outer("delta"),
            **{how: case.response(how) for how in kinds},
        }
        with torch.backends.mkldnn.flags(enabled="without" not in name):  # type: ignore[no-untyped-call]
            found = measure(runs, repeats)
        one = found["plain"]
        ratio = {key: f"{value / one:.2f}" for key, value in found.items()}
        for mode in ("stn", "delta"):
            ratio[f"whole {mode}"] = f"{found[f'outer {mode}'] / INNER / one:.2f}"
        steps.append([name, f"{1e3 * one:.2f} ms", *(ratio[k] for k in (
            "stn", "delta", "delta, not linearized", "whole stn", "whole delta"))])  # fmt: skip
        rest = (found["delta"] - found["inner"] - found["carried"]) / one
        parts.append([name, ratio["inner"], ratio["carried"], f"{rest:.2f}"])
        jvps.append([name, *(ratio.get(k, "-") for k in (
            "carried", "torch.func.jvp", "double backward"))])  # fmt: skip
        if "without" not in name:
            memory += multiples(case, name)
        print(steps[-1], jvps[-1], flush=True)
    header = ["network", "plain step", "STN", "Δ-STN", "Δ-STN, not linearized",
              "STN with outer steps", "Δ-STN with outer steps"]  # fmt: skip
    part_header = ["network", "general step", "response gradient", "noise, values, updates"]
    write(
        "self_tuning_cost",
        f"""# Cost of self-tuning

Command: `OMP_NUM_THREADS=1 python -m benchmarks.self_tuning.cost {repeats}`.
torch {torch.__version__}, float32, batch {BATCH}, two dropout rates with one value per example.
{" ".join((__doc__ or "").split("[repeats]")[1].split())}

Multiples of the plain step, for one training step (a step on w and Θ), and with a step on λ and σ
after every {INNER} of them:

{table(header, steps)}

Where the time of a Δ-STN step goes:

{table(part_header, parts)}

The gradient of a linearized response step by other kinds of derivative (multiples of a plain step):

{table(["network", "carried by layers", "torch.func.jvp", "double backward"], jvps)}

Memory, multiples of plain training with momentum; a general step of Δ-STN needs no more than plain
training, so that its response step counts:

{table(["network", "state", "kept for backward", "together"], memory)}

What bounds it: STN has twice the matrix products of the plain network, forward and backward. A
Δ-STN step is a plain step and a response step with 3 products forward (value, tangent, response)
and 2 backward (inputs through w, responses) where a plain step has 3 in all: (3 + 5) / 3 = 2.7.
The plain LSTM is a fused oneDNN kernel; one with a weight for each example is a loop over time
steps of general products, which run at another speed. The last row has general products for both.
""",
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
