"""Cost of the core methods in units of a plain training step.

    OMP_NUM_THREADS=1 python -m benchmarks.core.cost [repeats]

The yardstick is a step of `torch.optim.SGD` with momentum on the plain network, 64 samples.  CPU
time in one thread, medians over repeats in which all methods take turns.  Memory: bytes of
weights, optimizer states and the method's own tensors, and the most that autograd keeps at once
for backward passes.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters.networks import ConvNet
from adapters.reparam import attach, maps
from adapters.weights import LoRA
from benchmarks.core.cost_page import PAGE, ROWS
from benchmarks.self_tuning.cost import measure
from benchmarks.self_tuning.report import ROOT, table, write
from bilevel.adawac import SaddleWeights
from bilevel.balanced_ema import BalancedEMA, Fixed, Polynomial, Published
from bilevel.compander import WeightCompander, bound, compand, companders
from bilevel.compander_training import hyperparameters
from bilevel.diffora import DifferentialSearch
from bilevel.reweighting import LearnedWeights, Reweighter
from hypergrad import SGD, Estimator, Identity, Implicit, Problem, Unrolled

BATCH, SAMPLES, STEPS = 64, 1000, 5
LENGTH, TOKENS, DIM = 64, 65, 64

Step = Callable[[], None]


class Block(nn.Module):
    """Attention and a perceptron, normalized first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(2, (4, -1)).transpose(1, 2) for t in self.qkv(self.first(h)).chunk(3, 2)
        )
        scores = (q @ k.transpose(2, 3) / (DIM / 4) ** 0.5).softmax(3)
        h = h + self.out((scores @ v).transpose(1, 2).flatten(2))
        found: Tensor = h + self.down(F.gelu(self.up(self.second(h))))
        return found


class Transformer(nn.Module):
    """Two blocks over 64 tokens; ten classes from the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, DIM)
        self.place = nn.Parameter(0.02 * torch.randn(LENGTH, DIM))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.blocks(self.embed(x) + self.place).mean(1))
        return found


def conv() -> nn.Module:
    return ConvNet((1, 28, 28), 10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"conv net": conv, "transformer": Transformer}


class Peak:
    """The most bytes that autograd keeps at once while it is entered."""

    def __init__(self) -> None:
        self.most = self.now = 0
        self.owners: Counter[int] = Counter()

    def pack(self, t: Tensor) -> Any:
        peak, storage = self, t.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()

        class Kept:
            def __init__(self) -> None:
                self.tensor = t
                peak.now += size * (peak.owners[key] == 0)
                peak.owners[key] += 1
                peak.most = max(peak.most, peak.now)

            def __del__(self) -> None:
                peak.owners[key] -= 1
                peak.now -= size * (peak.owners[key] == 0)

        return Kept()

    def of(self, step: Step) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor):
            step()
        return self.most


class Subject:
    """A network with its data, and a step of every method on it."""

    def __init__(self, name: str) -> None:
        self.make = NETWORKS[name]
        torch.manual_seed(0)
        shape = (3, BATCH, 1, 28, 28) if name == "conv net" else (3, BATCH, LENGTH)
        draw = torch.randn(shape) if name == "conv net" else torch.randint(0, TOKENS, shape)
        self.x, self.view, self.x_val = draw.unbind()
        self.y, self.y_val = torch.randint(0, 10, (2, BATCH)).unbind()
        self.index = torch.randperm(SAMPLES)[:BATCH]
        self.steps: dict[str, tuple[Step, int]] = {}
        """Method -> a call, and the training steps in it."""
        self.state: dict[str, int] = {}
        """Method -> bytes of weights, optimizer state and the method's own."""
        self._plain()
        self._companders()
        self._sample_weights()
        self._adapters()
        self._averages()

    def _net(self, change: Callable[[nn.Module], Any] | None = None) -> nn.Module:
        torch.manual_seed(1)
        net = self.make()
        if change is not None:
            change(net)
        return net

    def _add(self, name: str, net: nn.Module, step: Step, count: int = 1, own: int = 0) -> None:
        """Take up a method; momentum is counted for what it trains, `own` in bytes."""
        self.steps[name] = step, count
        trained = sum(p.nbytes for p in net.parameters() if p.requires_grad)
        tensors = [*net.parameters(), *net.buffers()]
        self.state[name] = sum(t.nbytes for t in tensors) + trained + own

    def _trained(self, net: nn.Module, loss: Callable[[], Tensor]) -> Step:
        params = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(params, lr=1e-4, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step

    def _losses(self, net: nn.Module, x: Tensor | None = None) -> Tensor:
        return F.cross_entropy(net(self.x if x is None else x), self.y, reduction="none")

    def _plain(self) -> None:
        net = self._net()
        self._add("plain", net, self._trained(net, lambda: self._losses(net).mean()))

    def _companders(self) -> None:
        for name, learned in (("compander, fixed", False), ("compander, training loss", True)):
            net = self._net(lambda net: compand(net, WeightCompander(learned=learned)))  # noqa: B023
            train = self._trained(net, lambda net=net: self._losses(net).mean())  # type: ignore[misc]
            self._add(name, net, train)
        first = self._net(lambda net: compand(net, WeightCompander(learned=True)))
        logs = [log for pair in hyperparameters(first).values() for log in pair]
        ids = set(map(id, logs))
        weights = [p for p in first.parameters() if id(p) not in ids]
        inner = torch.optim.SGD(weights, lr=1e-4, momentum=0.9)
        outer = torch.optim.Adam(logs, lr=1e-4)

        def alternate() -> None:
            inner.zero_grad()
            found = torch.autograd.grad(self._losses(first).mean(), weights)
            for p, g in zip(weights, found, strict=True):
                p.grad = g
            inner.step()
            val = F.cross_entropy(first(self.x_val), self.y_val)
            for p, g in zip(logs, torch.autograd.grad(val, logs), strict=True):
                p.grad = g
            outer.step()

        self._add("compander, first order each step", first, alternate)
        net = self._net(compand)
        count = len(companders(net))

        class Run(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, h: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
                with nn.utils.parametrize.cached(), bound(self.net, h["a"], h["b"]):
                    return F.cross_entropy(self.net(x), y)

        run = Run()

        def loss(params: Any, h: Any, batch: Any) -> Tensor:
            found: Tensor = torch.func.functional_call(run, params, (h, *batch))
            return found

        h = {n: torch.full((count,), v, requires_grad=True) for n, v in (("a", 2.0), ("b", 1.0))}
        params = {f"net.{n}": p for n, p in net.named_parameters()}
        self._estimated("compander", net, Problem(loss, loss), params, h)

    def _estimated(self, name: str, net: nn.Module, problem: Problem, params: Any, h: Any) -> None:
        """A training step and a one-step hypergradient; and unrolled ones."""
        rule = SGD(lr=1e-4, momentum=0.9)
        batches = (self.x, self.y), (self.x_val, self.y_val)
        own = sum(t.nbytes for t in h.values())

        def call(estimator: Estimator[Any]) -> Step:
            state = [estimator.init(problem, params, h)]

            def step() -> None:
                state[0] = estimator(problem, params, h, *batches, state[0])[1]

            return step

        plain = self._trained(net, lambda: problem.inner_loss(params, h, batches[0]))
        one = call(Implicit(Identity(1e-4)))

        def both() -> None:
            plain(), one()

        self._add(f"{name}, one step each step", net, both, own=own)
        graph = Unrolled(rule, steps=STEPS, memory="graph")
        self._add(f"{name}, unrolled", net, call(graph), STEPS, own)
        replay = Unrolled(rule, steps=STEPS, memory="replay")
        self._add(f"{name}, unrolled, replayed", net, call(replay), STEPS, own)

    def _sample_weights(self) -> None:
        net = self._net()

        def consistency(weights: SaddleWeights | None) -> Tensor:
            a, b = net(self.x), net(self.view)
            labels = F.cross_entropy(a, self.y, reduction="none")
            between = (a - b).square().mean(1)
            if weights is None:
                return (labels + between).mean()
            found: Tensor = weights(self.index, labels, between)
            return found

        saddle = SaddleWeights(SAMPLES)
        own = sum(b.nbytes for b in saddle.buffers())
        self._add("two views", net, self._trained(net, lambda: consistency(None)))
        self._add("AdaWAC", net, self._trained(net, lambda: consistency(saddle)), own=own)
        for strategy in ("uniform", "linupper", "upper", "quadratic", "extremes"):
            rule = Reweighter(strategy)  # type: ignore[arg-type]
            net = self._net()
            step = self._trained(net, lambda net=net, rule=rule: rule(self._losses(net))[0])  # type: ignore[misc]
            self._add(f"reweighting, {strategy}", net, step)
        net, learned = self._net(), LearnedWeights()

        def outputs(params: Any, batch: Any) -> Tensor:
            found: Tensor = torch.func.functional_call(net, params, (batch[0],))
            return F.cross_entropy(found, batch[1], reduction="none")

        problem = Problem(
            lambda params, h, batch: learned(outputs(params, batch), h["theta"][self.index]),
            lambda params, h, batch: outputs(params, batch).mean(),
        )
        theta = {"theta": torch.zeros(SAMPLES, requires_grad=True)}
        params = dict(net.named_parameters())
        self._estimated("learned weights", net, problem, params, theta)

    def _adapters(self) -> None:
        net = self._net(lambda net: attach(net, LoRA(2)))
        self._add("LoRA", net, self._trained(net, lambda: self._losses(net).mean()))
        for how in ("first_order", "finite_difference", "score"):
            net = self._net(lambda net: attach(net, LoRA(2)))
            modules = maps(net)
            search = DifferentialSearch(STEPS, 0, lr=1e-4, hypergradient=how)  # type: ignore[arg-type]

            def step(net: nn.Module = net, search: DifferentialSearch = search) -> None:
                search(
                    maps(net),
                    [list(maps(net))],
                    [p for p in net.parameters() if p.requires_grad],
                    lambda x: self._losses(net, x).mean(),
                    lambda step: self.x,
                    lambda step: self.x_val,
                    share=0.5,
                )

            # Adam has a second moment beside the momentum that is counted.
            more = sum(p.nbytes for p in net.parameters() if p.requires_grad) + 12 * len(modules)
            self._add(f"DiffoRA, {how}", net, step, STEPS, more)

    def _averages(self) -> None:
        for name, rule, granularity in (
            ("EMA, fixed", Fixed(0.99), "global"),
            ("EMA, polynomial", Polynomial(), "global"),
            ("EMA, derived, global", Published(), "global"),
            ("EMA, derived, layer", Published(), "layer"),
            ("EMA, derived, tensor", Published(), "tensor"),
        ):
            net = self._net()
            train = self._trained(net, lambda net=net: self._losses(net).mean())  # type: ignore[misc]
            ema = BalancedEMA(dict(net.named_parameters()), rule, granularity=granularity)  # type: ignore[arg-type]

            def step(train: Step = train, ema: BalancedEMA = ema) -> None:
                train(), ema.update()

            step()
            kept = ema.state_dict()
            own = sum(
                t.nbytes
                for part in ("average", "gradient", "before")
                for t in (kept[part] or {}).values()
            )
            self._add(name, net, step, own=own)


def main(repeats: int) -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in NETWORKS:
        subject = Subject(name)
        saved = {method: Peak().of(step) for method, (step, _) in subject.steps.items()}
        runs = {method: step for method, (step, _) in subject.steps.items()}
        times = measure(runs, repeats, statistics.median)
        one = times["plain"]
        found[name] = {
            method: {
                "time": times[method] / count / one,
                "state": subject.state[method] / subject.state["plain"],
                "kept": saved[method] / saved["plain"],
                "together": (subject.state[method] + saved[method])
                / (subject.state["plain"] + saved["plain"]),
                "milliseconds": 1e3 * times[method] / count,
            }
            for method, (_, count) in subject.steps.items()
        }
        print(name, json.dumps(found[name], indent=1), flush=True)
    path = ROOT / "benchmarks" / "results" / "core_cost.json"
    path.write_text(json.dumps({"torch": torch.__version__, "networks": found}, indent=1) + "\n")
    header = ["step", *(f"{name}: {what}" for name in found for what in ("time", "memory"))]
    rows = []
    for method, title in ROWS.items():
        cells = (
            f"{found[name][method][key]:.2f}" for name in found for key in ("time", "together")
        )
        rows.append([title, *cells])
    plain = ", ".join(f"{n} {found[n]['plain']['milliseconds']:.2f} ms" for n in found)
    text = " ".join((__doc__ or "").split("[repeats]")[1].split())
    write("core_cost", PAGE.format(
        command=f"OMP_NUM_THREADS=1 python -m benchmarks.core.cost {repeats}",
        torch=torch.__version__, text=text, plain=plain, steps=STEPS, table=table(header, rows),
    ))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
