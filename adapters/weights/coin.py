"""CoIN: LoRA on a sequence of tasks, kept by a balanced average.

    θ*_t = β_t θ*_{t−1} + (1 − β_t) θ_t

θ, the increments and the last layer, is trained on one task after the other; θ* is what is
evaluated and merged, and θ ← θ* where a task ends, with fresh moments of Adam.  β is chosen by one
of the rules of `bilevel.balance_rules`.  The task needs "group", the number of each sample's task;
groups come in ascending order, and behind the last one the sequence begins anew.

The first task is not averaged unless `from_start`.  The rules' settings are smooth: the validation
loss is that of θ*_t, so its derivative is that in β_t, with earlier averages and the norms constant
(derived; the published method differentiates nothing); it is zero where β is the fallback.  Where
an estimator trains several steps, they count as one update without a gradient: "printed" and
"released" then take the fallback, and "fallbacks", the share of updates so far, says so.

Source: Qiao et al., Large continual instruction assistant, ICML 2025, arXiv 2410.10868, section 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from adapters.finetune import DECAY, learning_rate
from adapters.method import Batch, State
from adapters.reparam import configured
from adapters.tasks import Split
from adapters.weights.lora import LoRAMethod
from bilevel.balance_rules import (
    Fixed,
    LiteralRule,
    Norms,
    Polynomial,
    Published,
    Rule,
    group_of,
    measured,
    summed,
)
from bilevel.domains import Choice, Float, Grad, Int, Switch
from bilevel.metrics import Role
from bilevel.space import Space

__all__ = ["CoIN"]

SETTINGS = ("c", "old", "trade_off", "kappa")


class CoIN(LoRAMethod):
    """CoIN: LoRA on tasks in sequence, kept by a balanced average (Qiao et al., ICML 2025)."""

    name = "coin"
    space = Space(
        lr=learning_rate(0.01),
        weight_decay=DECAY,
        scale=Grad(1.0, low=0.01, high=64.0, scale="log", doc="factor s = alpha/r; smooth"),
        rank=Int(1, 32, log=True, default=4, doc="rank r of the increment"),
        balance=Choice(
            "polynomial", "printed", "released", "fixed", "none", default="polynomial", doc="of β"
        ),
        c=Grad(
            0.2,
            low=0.01,
            high=1.0,
            scale="log",
            doc="1 − β = c/t; smooth",
            when={"balance": "polynomial"},
        ),
        old=Grad(0.99, low=0.5, high=0.9999, doc="β; smooth", when={"balance": "fixed"}),
        trade_off=Grad(
            1.0, low=1e-2, high=1e3, scale="log", doc="λ; smooth", when={"balance": "printed"}
        ),
        kappa=Grad(
            2.0, low=1e-3, high=1e2, scale="log", doc="κ; smooth", when={"balance": "released"}
        ),
        granularity=Choice("tensor", "layer", "global", default="tensor", doc="what shares a β"),
        fallback=Float(0.9, 0.9999, default=0.99, doc="β where the rule gives none in (0, 1)"),
        from_start=Switch(False, doc="average in the first task too, from the pretrained weights"),
        epochs=Int(1, 50, log=True, default=5, doc="passes over each task"),
        batch=Int(8, 256, log=True, default=32, doc="samples of a step, at most those of a task"),
    ).own(lr="sampler")
    shuffle = False
    roles: ClassVar[Mapping[str, Role]] = {"fallbacks": "diagnostic"}

    def attach(self, model: nn.Module) -> None:
        """Put the increments on; start the average where the first task has one.

        Raises:
            ValueError: a task without "group".
        """
        task = self.setting.task
        if "group" not in task.split("train"):
            raise ValueError(
                f"{self.name} needs a sequence of tasks, with the number of each sample's task as "
                f"'group', but {task.name!r} holds {sorted(task.split('train'))}."
            )
        super().attach(model)
        trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.memory |= {
            "average": trained if self.setting.constants["from_start"] else {},
            "values": {},
            "gradient": {},
            "norms": {},
            "ended": False,
            "steps": 0,
            "updates": 0,
            "fallbacks": 0,
        }

    def pool(self, phase: str) -> Split:
        """The tasks in turn, each `epochs` times in new orders; "last" marks a task's end."""
        data, size = self.setting.task.split("train"), self._size()
        generator = torch.Generator().manual_seed(self.setting.seed)
        orders, last = [], []
        for group in sorted(set(data["group"].tolist())):
            rows = (data["group"] == group).nonzero()[:, 0].cpu()
            whole = len(rows) - len(rows) % size
            for epoch in range(self.setting.constants["epochs"]):
                orders.append(rows[torch.randperm(len(rows), generator=generator)[:whole]])
                mark = torch.zeros(whole)
                mark[whole - size :] = float(epoch == self.setting.constants["epochs"] - 1)
                last.append(mark)
        order = torch.cat(orders).to(data["group"].device)
        return {
            **{key: value[order] for key, value in data.items()},
            "last": torch.cat(last).to(order.device),
        }

    def batch_size(self, hparams: Mapping[str, Any]) -> int:
        """The samples of a step: never of two tasks."""
        return self._size()

    def _size(self) -> int:
        counts = Counter(self.setting.task.split("train")["group"].tolist())
        return min(int(self.setting.constants["batch"]), *counts.values())

    def predict(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return the outputs of θ in a training step, of θ* elsewhere."""
        if "last" in batch:
            return super().predict(model, hparams, batch)
        kept = self._kept(dict(model.named_parameters()), hparams)
        with configured(model, hparams):
            outputs = cast(Tensor, torch.func.functional_call(model, kept, (batch["x"],)))
        # A setting that does not act now has the derivative zero, and not none.
        settings = [hparams[n] for n in SETTINGS if isinstance(hparams.get(n), Tensor)]
        return outputs + 0.0 * torch.stack(settings).sum() if settings else outputs

    def after_batch(self, batch: Batch) -> Mapping[str, float]:
        """Note the end of a task; report the share of fallbacks so far."""
        self.memory["ended"] = self.memory["ended"] or bool(batch["last"].any())
        return {"fallbacks": self.memory["fallbacks"] / max(1, self.memory["updates"])}

    def after_step(self, state: State) -> None:
        """Choose β_t; where a task ends, go on from θ*."""
        memory, constants = self.memory, self.setting.constants
        if constants["balance"] == "none":
            memory["ended"] = False
            return
        if memory["average"]:
            memory["average"] = self._kept(memory["values"], state.hparams)
            self._look(state)
        if memory["ended"]:
            values = {n: v.clone() for n, v in state.params.items()}
            kept = self._kept(values, state.hparams)
            if memory["average"]:
                for name, value in state.params.items():
                    value.copy_(kept[name])
                for name, moment in state.optimizer.items():
                    fresh = torch.zeros_like(moment) if isinstance(moment, Tensor) else 0
                    state.optimizer[name] = fresh
            none: dict[str, Any] = {}
            memory |= {"average": kept, "values": none, "gradient": none, "norms": none}
            memory |= {"ended": False, "steps": 0}

    def _look(self, state: State) -> None:
        """Keep θ_t, g_t and the norms that decide β_t."""
        memory, constants = self.memory, self.setting.constants
        memory["steps"] += 1
        values = {n: v.clone() for n, v in state.params.items()}
        if state.grads is None:
            nothing = {n: torch.zeros_like(v) for n, v in values.items()}
            each, gradient = measured(values, memory["average"], nothing, None), {}
        else:
            gradient = {n: g.clone() for n, g in state.grads.items()}
            earlier = (memory["values"], memory["gradient"]) if memory["gradient"] else None
            each = measured(values, memory["average"], gradient, earlier)
        found = summed(each, constants["granularity"], memory["steps"])
        rule = self._rule(state.hparams)
        for norms in found.values():
            memory["updates"] += 1
            memory["fallbacks"] += rule.balance(norms, constants["fallback"])[1]
        memory |= {
            "values": values,
            "gradient": gradient,
            "norms": {group: list(norms) for group, norms in found.items()},
        }

    def _kept(self, values: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return θ*_t = β_t θ*_{t−1} + (1 − β_t) θ, or θ itself before a first coefficient."""
        memory, constants = self.memory, self.setting.constants
        if not memory["norms"]:
            return dict(memory["average"]) if not values else dict(values)
        rule = self._rule(hparams)
        found = dict(values)
        for name, average in memory["average"].items():
            norms = Norms(*memory["norms"][group_of(name, constants["granularity"])])
            beta, _ = rule.balance(norms, constants["fallback"])
            found[name] = average + (1 - beta) * (values[name] - average)
        return found

    def _rule(self, hparams: Mapping[str, Any]) -> Rule:
        balance = self.setting.constants["balance"]
        if balance == "polynomial":
            return Polynomial(hparams["c"])
        if balance == "fixed":
            return Fixed(hparams["old"])
        if balance == "printed":
            return LiteralRule(hparams["trade_off"])
        return Published(hparams["kappa"])

    def finish(self, model: nn.Module, hparams: Mapping[str, Any]) -> nn.Module:
        """Put θ* in and merge it."""
        with torch.no_grad():
            kept = self._kept({n: p.clone() for n, p in model.named_parameters()}, hparams)
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
        return super().finish(model, hparams)
