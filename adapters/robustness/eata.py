"""EATA: adaptation to an unlabeled stream, by the entropy of reliable and new samples.

    min_Θ  mean_{b ∈ S} −exp(E₀ − E_b)  +  β Σ_j F_j (Θ_j − Θ₀_j)²

    E_b = −Σ_k p_bk log p_bk,    S = {b : E_b < E₀ and |cos(p_b, m)| < ε}
    m ← μ m + (1 − μ) mean_S p  (m ← mean_S p first; before that the cosine does not count)
    F_j = mean over source batches of (∂ CE(batch; argmax labels) / ∂Θ_j)²

Θ are the scales and shifts of the BatchNorm layers, and only they are trained; all layers use the
statistics of the batch.  Where S is empty nothing moves, momentum buffers included.  Predictions
that are scored ("accuracy" of a step) come from before the update; labels are used for nothing
else.  Training samples are drawn in the order of the stream; corruptions ("group") are evaluated
one by one, since batch statistics are those of one corruption.

The published loss weights the entropy, exp(E₀ − E_b) E_b with a detached weight; its gradient
exp(E₀ − E_b) ∇E_b is exactly that of −exp(E₀ − E_b), which has a correct second derivative too,
so that hypergradients in β and E₀ are exact at a fixed selection S.

Differs from the published code on purpose: one default E₀ (0.4 ln K; its class and its command
line disagree), and one default for the number of Fisher samples and the weight β.  F is the
square of a mean gradient over batches of 64, so β does not carry over to other batch sizes.

Source: Niu, Wu, Zhang, Chen, Zheng, Zhao and Tan, "Efficient Test-Time Model Adaptation without
Forgetting", ICML 2022.  β = 0 is its ETA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters import artifacts
from adapters.blending import fisher_diagonal, quadratic_anchor
from adapters.losses import entropy
from adapters.method import Batch, Method, keep
from adapters.networks import ConvNet
from adapters.tasks import Split, Task, Transfer
from adapters.updates import Wrapped
from bilevel.domains import Float, Grad, Int
from bilevel.metrics import Role
from bilevel.space import Space
from hypergrad import seeded
from hypergrad.optimizers import SGD, Optimizer, State, Value, Values

__all__ = ["EATA", "SkipZero"]


@dataclass(frozen=True)
class SkipZero(Wrapped):
    """An update rule that a gradient of zero leaves alone: weights, buffers and counters stay."""

    def update(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, State]:
        """See `Optimizer.update`."""
        if not bool(grad.detach().any()):
            return flat, dict(state)
        return self.base.update(flat, grad, state, values)


class EATA(Method):
    """Test-time adaptation of BatchNorm by the entropy of reliable samples, anchored by Fisher."""

    name = "eata"
    space = Space(
        margin=Grad(
            0.4,
            low=0.05,
            high=1.0,
            doc="E₀ as a share of ln K; smooth in the weights, the selection is not",
        ),
        redundancy=Float(0.01, 2.0, log=True, default=0.4, doc="ε; 1 and more keeps all"),
        anchor=Grad(1.0, low=1e-4, high=1e5, scale="log", doc="β, Fisher weight; smooth"),
        lr=Grad(5e-3, low=1e-5, high=0.1, scale="log", doc="learning rate; smooth"),
        memory=Float(0.5, 0.99, default=0.9, doc="μ of the mean prediction"),
        fisher_samples=Int(64, 5000, log=True, default=512, doc="source samples for F"),
        repeats=Int(1, 5, default=1, doc="steps on each batch of the stream"),
        batch=Int(16, 512, log=True, default=64, doc="samples of a batch"),
    ).own(lr="sampler", margin="sampler")
    needs = ("batchnorm_net",)
    shuffle = False
    task_type: ClassVar[type[Task]] = Transfer
    roles: ClassVar[Mapping[str, Role]] = {
        "reliable": "diagnostic",
        "selected": "diagnostic",
        "first": "diagnostic",
    }

    def network(self) -> nn.Module:
        """Return the network trained on the source."""
        return cast(nn.Module, self.setting.artifacts["batchnorm_net"])

    def attach(self, model: nn.Module) -> None:
        """Train scales and shifts only, by batch statistics; measure F on the source."""
        model.requires_grad_(False)
        layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        if not any(layer.affine for layer in layers):
            raise ValueError(
                f"{self.name} adapts the scales and shifts of BatchNorm2d, but "
                f"{type(model).__name__} has none."
            )
        for layer in layers:
            layer.requires_grad_(True)
            # Without running statistics a layer normalizes by the batch in both modes.
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        x = self.setting.task.split("source")["x"][: self.setting.constants["fisher_samples"]]
        batches = [b for b in torch.split(x, 64) if len(b) > 1]

        def loss(batch: Tensor) -> Tensor:
            logits = model(batch)
            return F.cross_entropy(logits, logits.argmax(dim=1))

        self.memory |= {
            "fisher": fisher_diagonal(loss, trained, batches),
            "start": {name: value.detach().clone() for name, value in trained.items()},
            "mean": None,
        }

    def pool(self, phase: str) -> Split:
        """The stream, each block of a batch `repeats` times; "first" marks its first time."""
        stream = self.setting.task.split("train")
        size, times = self.setting.constants["batch"], self.setting.constants["repeats"]
        rows = len(stream["y"])
        size = min(size, rows)
        blocks = torch.arange(rows - rows % size).reshape(-1, 1, size)
        order = blocks.expand(-1, times, -1).flatten().to(stream["y"].device)
        first = torch.zeros(len(blocks), times, size)
        first[:, 0] = 1.0
        return {
            **{key: value[order] for key, value in stream.items()},
            "first": first.flatten().to(stream["y"].device),
        }

    def batch_size(self, hparams: Mapping[str, Any]) -> int:
        """The space's "batch"."""
        return cast(int, hparams["batch"])

    def optimizer(self, hyper: Callable[[str], Value]) -> Optimizer:
        """SGD with momentum 0.9; no step where no sample was selected."""
        return SkipZero(SGD(lr=hyper("lr"), momentum=0.9))

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Weighted entropy of the selected samples, and the pull to the source."""
        logits = model(batch["x"])
        uncertainty = entropy(logits)
        margin = hparams["margin"] * math.log(logits.shape[1])
        p = logits.detach().softmax(dim=1)
        reliable = uncertainty.detach() < margin
        selected = reliable & self._new(p, hparams["redundancy"])
        keep(batch, p=p, reliable=reliable, selected=selected)
        if not bool(selected.any()):
            return cast(Tensor, 0.0 * logits.sum())
        gain = -torch.exp(margin - uncertainty[selected]).mean()
        named = dict(model.named_parameters())
        pull = quadratic_anchor(named, self.memory["start"], self.memory["fisher"])
        return cast(Tensor, gain + hparams["anchor"] * pull)

    def _new(self, p: Tensor, redundancy: float) -> Tensor:
        mean = self.memory["mean"]
        if mean is None:
            return torch.ones(len(p), dtype=torch.bool, device=p.device)
        return F.cosine_similarity(p, mean[None], dim=1).abs() < redundancy

    def after_batch(self, batch: Batch) -> Mapping[str, float]:
        """Move the mean prediction; report accuracy and shares of the first pass over a batch."""
        kept = batch["kept"]
        if bool(kept["selected"].any()):
            now = kept["p"][kept["selected"]].mean(dim=0)
            old = self.memory["mean"]
            share = self.setting.constants["memory"]
            self.memory["mean"] = now if old is None else share * old + (1 - share) * now
        return {
            "accuracy": float((kept["p"].argmax(dim=1) == batch["y"]).double().mean()),
            "reliable": float(kept["reliable"].double().mean()),
            "selected": float(kept["selected"].double().mean()),
            "first": float(batch["first"].double().mean()),
        }

    def predict(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return logits, each corruption normalized by its own statistics."""
        x = batch["x"]
        if "group" not in batch:
            return cast(Tensor, model(x))
        groups = batch["group"].unique()
        rows = torch.cat([(batch["group"] == g).nonzero()[:, 0] for g in groups])
        outputs = torch.cat([model(x[batch["group"] == g]) for g in groups])
        return outputs[rows.argsort()]


@artifacts.register("batchnorm_net")
def batchnorm_net(task: Task, seed: int) -> nn.Module:
    """A `ConvNet` with BatchNorm trained on the source: Adam at 5e-3, 200 steps of 64."""
    if not isinstance(task, Transfer) or not task.is_image:
        raise ValueError(
            f"batchnorm_net needs images with a source, but {task.name!r} is a "
            f"{type(task).__name__} of shape {task.input_shape}."
        )
    with seeded(seed):
        model = ConvNet(task.input_shape, task.source_classes, width=8, batch_norm=True)
    model = model.to(task.device, task.dtype).train()
    source = task.split("source")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        rows = torch.randint(len(source["y"]), (64,), generator=generator).to(task.device)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(model(source["x"][rows]), source["y"][rows])
            torch.autograd.backward(loss)
        optimizer.step()
    optimizer.zero_grad()
    return model
