"""BANG: average pretrained weights with weights fine-tuned on softened, mixed-up targets.

    θ_ft = argmin_θ  mean_b −Σ_k q_bk log softmax(f_θ(x̃_b))_k      from θ₀
    (x̃, q) = Mixup_a(x, (1 − ε) onehot(y) + ε/K)
    θ_w  = (1 − w) θ₀ + w θ_ft

The phase "finetune" trains all weights; the phase "blend" trains nothing and is where the mixing
weight w moves: dL/dw = ⟨∇L(θ_w), θ_ft − θ₀⟩ exactly, without unrolling, for one w or one for each
tensor.  Everything that is measured, in both phases, is measured at θ_w; `finish` returns θ_w as a
plain network.  The smoothing ε and the learning rate are smooth through unrolled fine-tuning, in
the first phase.  A fine-tuned network that is over-confident outweighs θ₀ in the average, which
softening cures; ε = a = 0 is WiSE-FT.

Source: Lin, Tan, Hao, Wong, Dong, Zhang, Yang and Zhang, "Spurious Feature Diversification
Improves Out-of-distribution Generalization", ICLR 2024; Wortsman et al., "Robust
fine-tuning of zero-shot models", CVPR 2022.  One weight for each tensor is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from adapters.blending import blend
from adapters.finetune import DECAY, FineTune, head_of, learning_rate
from adapters.losses import mixed, smoothed_targets, soft_cross_entropy
from adapters.method import Batch, State
from adapters.tasks import Classification
from bilevel.domains import Float, Grad, Int
from bilevel.space import Space
from hypergrad.optimizers import SGD, Optimizer, Value

__all__ = ["BANG"]


class BANG(FineTune):
    """Balanced averaging: pretrained weights averaged with weights from softened fine-tuning."""

    name = "bang"
    space = Space(
        mix=Grad(0.5, low=0.0, high=1.0, doc="w, one per tensor; smooth, exact without unrolling"),
        scale=Grad(
            1.0, low=0.2, high=5.0, scale="log", doc="factor of the pretrained logits; smooth"
        ),
        smoothing=Grad(0.1, low=0.0, high=0.4, doc="label smoothing ε; smooth"),
        mixup=Float(0.0, 2.0, default=0.4, doc="Mixup's Beta(a, a); 0 is none"),
        lr=learning_rate(2e-3),
        weight_decay=DECAY,
        steps=Int(10, 5000, log=True, default=300, doc="fine-tuning steps"),
    ).own(lr="sampler", weight_decay="sampler", smoothing="sampler")
    phases = ("finetune", "blend")
    scopes: ClassVar[Mapping[str, str]] = {"mix": "blend", "scale": "blend"}

    def attach(self, model: nn.Module) -> None:
        """Remember the pretrained weights."""
        self._blending = False
        self.memory["start"] = {n: p.detach().clone() for n, p in model.named_parameters()}

    def shapes(self, model: nn.Module) -> Mapping[str, tuple[int, ...]]:
        """One mixing weight for each tensor."""
        return {"mix": (len(list(model.parameters())),)}

    def optimizer(self, hyper: Callable[[str], Value]) -> Optimizer:
        """AdamW; in the phase "blend" a rule that moves nothing."""
        return SGD(lr=0.0) if self._blending else super().optimizer(hyper)

    def begin(self, phase: str, state: State) -> None:
        """Stop training."""
        self._blending = True

    def done(self, state: State) -> bool:
        """Whether fine-tuning has had its steps."""
        return bool(state.step >= state.hparams["steps"])

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Cross entropy of mixed-up samples with smoothed labels, at the fine-tuned weights."""
        classes = cast(Classification, self.setting.task).n_classes
        q = smoothed_targets(batch["y"], classes, hparams["smoothing"]).to(batch["x"])
        x, targets = mixed(batch["x"], q, concentration=hparams["mixup"])
        return soft_cross_entropy(model(x), targets).mean()

    def predict(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return the logits of θ_w."""
        averaged = self._average(model, hparams)
        return cast(Tensor, torch.func.functional_call(model, averaged, (batch["x"],)))

    def finish(self, model: nn.Module, hparams: Mapping[str, Any]) -> nn.Module:
        """Store θ_w in the network."""
        with torch.no_grad():
            averaged = self._average(model, hparams)
            for name, parameter in model.named_parameters():
                parameter.copy_(averaged[name])
        return model

    def _average(self, model: nn.Module, hparams: Mapping[str, Any]) -> dict[str, Tensor]:
        tuned = dict(model.named_parameters())
        head, scale = head_of(model), hparams["scale"]
        start = {
            n: v * scale if n.rpartition(".")[0] == head else v
            for n, v in self.memory["start"].items()
        }
        mix = torch.as_tensor(hparams["mix"]).expand(len(tuned))
        return blend(start, tuned, dict(zip(start, mix.unbind(), strict=True)))
