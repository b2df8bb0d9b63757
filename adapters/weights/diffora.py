"""DiffoRA as a learner: search for the modules that are worth adapting, then adapt them alone.

    search   w_j = W₀ + G_j (g(W₀, θ_j) − W₀),  θ on one half of the training split, α on the other
    adapt    the best share ρ of the modules, θ anew, on the whole training split; α is discarded

over any weight map g that needs no hooks of its own: LoRA, MiSS, HUT, SVFit, EVA, LoRA-SB.  The
halves are stratified and never hold validation or test samples, so that the validation loss stays
honest for whoever tunes this learner's hyperparameters.

Trained: the maps and the last layer; frozen: W₀ and the biases.  Modules that are not selected are
frozen ("none"), or one θ for all of the same shape is trained in them ("shared"), or they keep
what the search found, frozen, at their gates ("keep", which carries over what α has seen of the
second half).  How the paper shares weights is open; these three are derived.

α moves by `bilevel.diffora.DifferentialSearch` once for each step of θ; where an estimator trains
several steps at once, α makes up for them afterwards.  A hypergradient through steps of the search
holds α constant.  In the search, evaluation is at the relaxed gates.

Source: Jiang, Wang and Yuan, DiffoRA, arXiv 2502.08905; see `bilevel.diffora` for what is derived.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapters.assembly import derive_seed
from adapters.finetune import DECAY, head_of, learning_rate
from adapters.method import Batch, State
from adapters.reparam import Reparam, attach, detach, maps, replaced, share
from adapters.tasks import Split
from adapters.tasks.make import halves
from adapters.weights.eva import EVA
from adapters.weights.hut import HUT
from adapters.weights.lora import LoRA
from adapters.weights.lora_sb import LoRASB
from adapters.weights.method import WeightAdapter
from adapters.weights.miss import MiSS
from adapters.weights.svfit import SVFit
from bilevel import checkpoint
from bilevel.diffora import DifferentialSearch
from bilevel.domains import Choice, Float, Grad, Int
from bilevel.selection import Selection, discretize, layer_rows
from bilevel.space import Space
from hypergrad import seeded

__all__ = ["DiffoRA"]


class DiffoRA(WeightAdapter):
    """DiffoRA: a relaxed search for the modules to adapt, then any adapter on those (Jiang, 2025).

    Attributes:
        adapters: the weight maps that the hyperparameter "adapter" chooses from.
        rows: names of the candidate modules, one row for each layer.
    """

    name = "diffora"
    space = Space(
        lr=learning_rate(0.01),
        weight_decay=DECAY,
        scale=Grad(
            1.0,
            low=0.01,
            high=64.0,
            scale="log",
            doc="factor s of the map; smooth",
            when={"adapter": ("lora", "miss", "hut", "eva", "lora_sb")},
        ),
        adapter=Choice(
            "lora", "miss", "hut", "svfit", "eva", "lora_sb", default="lora", doc="weight map"
        ),
        rank=Int(1, 32, log=True, default=4, doc="rank r of the map"),
        share=Float(0.05, 1.0, default=0.5, doc="share ρ of the modules that is adapted"),
        scope=Choice("row", "global", "budget", default="row", doc="what ρ is a share of"),
        search_steps=Int(2, 100_000, log=True, default=100, doc="steps of the search"),
        warm_up=Float(0.0, 0.9, default=0.2, doc="share of the search before the gates move"),
        hypergradient=Choice(
            "first_order",
            "finite_difference",
            "score",
            default="first_order",
            doc="how the gates are scored",
        ),
        relaxation=Choice(
            "softmax",
            "sigmoid",
            default="softmax",
            doc="of the gates",
            when={"hypergradient": ("first_order", "finite_difference")},
        ),
        gate_rule=Choice(
            "adam",
            "sgd",
            default="adam",
            doc="how the gates move",
            when={"hypergradient": ("first_order", "finite_difference")},
        ),
        gate_lr=Float(
            1e-3,
            10.0,
            log=True,
            default=0.02,
            doc="learning rate of the gates",
            when={"hypergradient": ("first_order", "finite_difference")},
        ),
        sharing=Choice("none", "shared", "keep", default="none", doc="what the others get"),
        shared_rank=Int(
            1, 8, log=True, default=1, doc="rank of what is shared", when={"sharing": "shared"}
        ),
    ).own(lr="sampler")
    phases = ("search", "adapt")
    scopes: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("share", "scope", "sharing", "shared_rank"), "adapt"
    )
    reparam = LoRA
    adapters: ClassVar[Mapping[str, type[Reparam]]] = {
        "lora": LoRA, "miss": MiSS, "hut": HUT, "svfit": SVFit, "eva": EVA, "lora_sb": LoRASB,
    }  # fmt: skip

    rows: list[list[str]]

    def settings(self) -> Reparam:
        """The chosen map with the run's constants."""
        return replaced(self.adapters[self.setting.constants["adapter"]](), self.setting.constants)

    def attach(self, model: nn.Module) -> None:
        """Put a gated map on every candidate.

        Raises:
            ValueError: no candidate module, ρ outside (0, 1], or fewer than two training samples.
        """
        names = self.targets(model)
        if not names:
            raise ValueError(
                f"there are no candidate modules: {type(model).__name__} has no layer that a "
                "weight map fits but its last one."
            )
        self.rows = layer_rows(names)
        super().attach(model)
        like = next(p for p in model.parameters() if p.requires_grad)
        sizes = self._sizes(model)
        discretize(torch.zeros_like(sizes), self.setting.constants["share"], "row")
        self.memory["search"] = self._search({}).init(self.rows, like.detach())
        head = model.get_submodule(head_of(model))
        self.memory["head"] = checkpoint.copy(dict(head.state_dict()))
        self._sides = halves(
            self.setting.task.split("train"), derive_seed(self.setting.seed, "halves")
        )

    def pool(self, phase: str) -> Split:
        """The first half of the training split in the search, all of it afterwards."""
        return self._sides[0] if phase == "search" else self.setting.task.split("train")

    def done(self, state: State) -> bool:
        """Whether the search has had its steps."""
        return bool(state.step >= state.hparams["search_steps"])

    def after_step(self, state: State) -> None:
        """Move α by a batch of the second half.

        Raises:
            FloatingPointError: the loss there is not finite; α stays as it was.
        """
        if state.phase != "search":
            return
        model, found = state.model, maps(state.model)
        named = dict(model.named_parameters())
        for name, value in state.params.items():
            named[name].copy_(value)
        modes = {module: module.training for module in model.modules()}
        gated = [found[name] for row in self.rows for name in row]
        device = self.setting.task.device

        def loss(batch: Batch) -> Tensor:
            outputs = WeightAdapter.predict(self, model, state.hparams, batch)
            return self.setting.task.measure(outputs, batch)["loss"].mean()

        try:
            model.eval()
            seed = derive_seed(self.setting.seed, f"gates {state.step}")
            search, now = self._search(state.hparams), self.memory["search"]
            with seeded(seed, [device]):
                while now["step"] < state.step:
                    now = search.step(
                        now,
                        gated,
                        [named[name] for name in state.params],
                        loss,
                        lambda step: self._batch(0, step, state.hparams),
                        lambda step: self._batch(1, step, state.hparams),
                    )
            self.memory["search"] = now
        finally:
            for each in gated:
                each.gate = 1.0
            for module, training in modes.items():
                module.training = training

    def begin(self, phase: str, state: State) -> None:
        """Discretize, and adapt the chosen modules anew from the pretrained weights."""
        model, constants = state.model, self.setting.constants
        searched = maps(model)
        if "mask" not in self.memory:
            selection = self._search({}).selection(
                self.memory["search"], self.rows, constants["share"], self._sizes(model)
            )
            self.memory["mask"] = selection.mask
        chosen = set(self.selection.names)
        found = {
            name: {n: p.detach() for n, p in m.named_parameters()} for name, m in searched.items()
        }
        detach(model)
        head = model.get_submodule(head_of(model))
        head.load_state_dict(self.memory["head"])
        wanted = dict(self.choose(model))
        rest = [name for name in wanted if name not in chosen]
        if constants["sharing"] == "none":
            wanted = {name: each for name, each in wanted.items() if name in chosen}
        if constants["sharing"] == "shared":
            low = {"rank": constants["shared_rank"]}
            wanted |= {name: replaced(wanted[name], low) for name in rest}
        attach(model, wanted, train=f"{head_of(model)}.*", calibrate=self.calibrate)
        now = maps(model)
        if constants["sharing"] == "shared":
            share({n: model.get_submodule(n) for n in rest}, {n: now[n] for n in rest})
        if constants["sharing"] == "keep":
            self._keep(now, found, rest)

    def _keep(
        self,
        now: Mapping[str, nn.Module],
        found: Mapping[str, Mapping[str, Tensor]],
        rest: list[str],
    ) -> None:
        """Freeze what the search found on the modules that are not selected, at their gates."""
        values = self._search({}).gates(self.memory["search"]).flatten().tolist()
        flat = [name for row in self.rows for name in row]
        gates = dict(zip(flat, values, strict=True))
        for name in rest:
            now[name].gate = gates[name]
            for n, parameter in now[name].named_parameters():
                parameter.requires_grad_(False).copy_(found[name][n])

    @property
    def selection(self) -> Selection:
        """The kept modules and how α came there; there from the phase "adapt" on.

        Raises:
            RuntimeError: the search is not over.
        """
        if "mask" not in self.memory:
            raise RuntimeError("the search is not over: there is a selection once it has ended.")
        return self._search({}).selected(self.memory["search"], self.rows, self.memory["mask"])

    def predict(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return the outputs; in the search at the relaxed gates."""
        with self._gated(model):
            return super().predict(model, hparams, batch)

    def finish(self, model: nn.Module, hparams: Mapping[str, Any]) -> nn.Module:
        """Merge the maps; in the search at the relaxed gates."""
        with self._gated(model):
            return super().finish(model, hparams)

    @contextmanager
    def _gated(self, model: nn.Module) -> Iterator[None]:
        found = maps(model) if "mask" not in self.memory else {}
        flat = [found[name] for row in self.rows for name in row] if found else []
        try:
            if flat:
                values = self._search({}).gates(self.memory["search"]).flatten()
                for each, value in zip(flat, values, strict=True):
                    each.gate = value
            yield
        finally:
            for each in flat:
                each.gate = 1.0

    def _search(self, hparams: Mapping[str, Any]) -> DifferentialSearch:
        """Return the search; its lr is the current one, which "finite_difference" steps by."""
        c = {**self.setting.constants, **hparams}
        steps = c["search_steps"]
        more = {n: c[n] for n in ("gate_lr", "gate_rule", "relaxation") if n in c}
        return DifferentialSearch(
            steps,
            min(steps - 1, round(c["warm_up"] * steps)),
            lr=float(c.get("lr", 1.0)),
            hypergradient=c["hypergradient"],
            scope=c["scope"],
            **more,
        )

    def _sizes(self, model: nn.Module) -> Tensor:
        found = maps(model)
        sizes = [[sum(p.numel() for p in found[n].parameters()) for n in row] for row in self.rows]
        return torch.tensor(sizes, dtype=torch.float64)

    def _batch(self, side: int, step: int, hparams: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch of a half at a step; it depends on nothing else, so resume is exact."""
        split = self._sides[side]
        seed = derive_seed(self.setting.seed, f"half {side} {step}")
        order = torch.randperm(len(split["y"]), generator=torch.Generator().manual_seed(seed))
        rows = order[: self.batch_size(hparams)].to(split["y"].device)
        return {**{k: v[rows] for k, v in split.items()}, "step": step, "phase": "search"}
