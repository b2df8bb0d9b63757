"""AdaWAC: a learned weight per sample between the labels and the agreement of two views.

    loss = mean_b [β'_b ℓ_CE,b + (1 − β'_b) λ ρ(z₁, z₂)_b],   logit β' = logit β + η (ℓ_CE − λ ρ)

ℓ_CE is the mean loss of two noisy views, ρ one minus the cosine of their hidden features.  On masks
both views are also turned and mirrored, and logits and features are turned back, pixel over pixel.
Weights start at ½ and are kept by sample index; an index that occurs twice takes both steps.  All
weights of the network are trained, nothing is frozen.  β' has no gradient in training and its full
derivative in a hypergradient, where the weights at the start of the window are constant; the
published objective is a min-max on one data set, and β itself is never tuned by a hypergradient.

Source: Dong, Xie and Ward, ICML 2023, arXiv 2210.01891, algorithm 1; see `bilevel.adawac`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from adapters.losses import half_squares
from adapters.method import Batch, Method, keep
from adapters.networks import MLP, UNet
from adapters.tasks import Classification, Segmentation, Task
from bilevel.adawac import mixed
from bilevel.dense import Turns, disagreement
from bilevel.domains import Float, Grad, Int
from bilevel.space import Space

__all__ = ["AdaWAC"]


class AdaWAC(Method):
    """AdaWAC: a saddle weight per sample between labels and consistency (Dong et al., 2023)."""

    name = "adawac"
    task_type: ClassVar[type[Task]] = Task  # type: ignore[type-abstract]
    space = Space(
        lr=Grad(0.05, low=1e-3, high=1.0, scale="log", doc="learning rate; smooth"),
        weight_decay=Grad(1e-4, low=1e-7, high=1e-1, scale="log", doc="L2 penalty; smooth"),
        consistency=Grad(1.0, low=0.1, high=10.0, scale="log", doc="scale λ of ρ; smooth"),
        weight_step=Grad(1.0, low=0.01, high=10.0, scale="log", doc="mirror step η; smooth"),
        noise=Grad(0.1, low=1e-3, high=0.5, scale="log", doc="of the two views; smooth"),
        init=Float(0.1, 0.9, default=0.5, doc="β before the first visit"),
        clamp=Float(4.0, 12.0, default=6.0, doc="largest |logit β|"),
        burn_in=Int(0, 1000, default=20, doc="steps in which β does not move"),
    ).own(lr="sampler", weight_step="sampler")

    def network(self) -> nn.Module:
        """A perceptron with two hidden layers of 64 units, tanh; a small U-Net for masks."""
        task = self.setting.task
        if isinstance(task, Segmentation):
            return UNet(task.input_shape)
        if isinstance(task, Classification):
            return MLP(task.input_shape, task.n_classes, activation="tanh")
        raise ValueError(
            f"adawac needs a task of type Classification or Segmentation, but {task.name!r} is a "
            f"{type(task).__name__}."
        )

    def batch_size(self, hparams: Mapping[str, Any]) -> int:
        """64 samples, or 16 images with masks."""
        return 16 if isinstance(self.setting.task, Segmentation) else 64

    def attach(self, model: nn.Module) -> None:
        """Start every weight at init."""
        task, init = self.setting.task, self.setting.constants["init"]
        logit = torch.logit(torch.tensor(init, dtype=torch.float64))
        rows = len(task.split("train")["y"])
        self.memory["logits"] = torch.full((rows,), float(logit), dtype=task.dtype).to(task.device)

    def detached(
        self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch
    ) -> dict[str, Tensor]:
        """The updated logits of the batch."""
        supervised, consistency = self._losses(model, hparams, batch)
        logits, index = self.memory["logits"], batch["index"]
        if batch["step"] >= hparams["burn_in"]:
            steps = hparams["weight_step"] * (supervised - consistency)
            logits = logits.index_add(0, index, steps)
        return {"logits": logits[index].clamp(-hparams["clamp"], hparams["clamp"])}

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """mean [β' ℓ_CE + (1 − β') λ ρ]."""
        keep(batch, logits=batch["logits"])
        return mixed(batch["logits"].sigmoid(), *self._losses(model, hparams, batch))

    def after_batch(self, batch: Batch) -> Mapping[str, float]:
        """Store the updated logits."""
        self.memory["logits"][batch["index"]] = batch["kept"]["logits"]
        return {}

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor:
        """½ λ ‖w‖²."""
        return half_squares(hparams["weight_decay"], model.parameters())

    def _losses(
        self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return ℓ_CE and λ ρ of each sample; the views are those of the batch's seed."""
        x, generator = batch["x"], torch.Generator().manual_seed(int(batch["seed"]) % 2**63)
        task = cast(Classification | Segmentation, self.setting.task)
        dense, square = isinstance(task, Segmentation), x.shape[-1] == x.shape[-2]
        losses, features = [], []
        for _ in range(2):
            drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            view, seen = x + hparams["noise"] * drawn, list[Tensor]()
            turns = Turns.draw(len(x), generator, square=square) if dense else None
            logits = model(
                view if turns is None else turns(view), lambda i, h, s=seen: s.append(h) or h
            )
            losses.append(
                task.measure(logits if turns is None else turns.undo(logits), batch)["loss"]
            )
            features.append(seen[-1] if turns is None else turns.undo(seen[-1]))
        return (losses[0] + losses[1]) / 2, hparams["consistency"] * disagreement(
            features[0], features[1]
        )
