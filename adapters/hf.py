"""HF PEFT methods as learners: their adapters on a Hugging Face model, under our contract.

    pip install 'bilevel[hf]'

The adapters are PEFT's own modules in the network (`peft.get_peft_model`), so the numbers are
PEFT's; the trainer, the tasks, resume and studies are ours.  Trained: what PEFT trains; frozen: the
rest.  Hypergradients pass through the adapters that are plain tensor operations: not through
RandLoRA, whose custom function has no second derivative.

PEFT-wrapped models do not work in `higher`; our own maps (`adapters.weights`) do.

Sources: of each method in `adapters.weights`, and PiSSA (Meng et al., 2024), OLoRA (Büyükakyüz,
2024), CorDA (Yang et al., 2024), RandLoRA (Albert et al., 2025).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

import adapters.language  # noqa: F401  (registers the pretrained network)
from adapters.finetune import DECAY, head_of, learning_rate
from adapters.losses import half_squares
from adapters.method import Method, State
from adapters.tasks import Sequences, Task
from bilevel.domains import Choice, Float, Int
from bilevel.space import Space
from hypergrad.optimizers import Adam, Optimizer, Value

__all__ = ["PEFT_METHODS", "PeftTune", "peft_config"]

PEFT_METHODS = (
    "lora", "pissa", "olora", "eva", "corda", "adalora", "miss", "bat", "randlora",
)  # fmt: skip


def peft_config(
    method: str, rank: int, alpha: int, targets: str | list[str], **options: Any
) -> Any:
    """Return PEFT's configuration of a method.

    Args:
        method: one of `PEFT_METHODS`.
        rank: r; for "adalora" the rank at the end.
        alpha: scale · r, for methods that have it.
        targets: PEFT's ``target_modules``: names, a regular expression, or "all-linear".
        **options: further fields of the configuration.

    Raises:
        ValueError: an unknown method, or a rank below 1.
    """
    import peft

    if method not in PEFT_METHODS:
        raise ValueError(f"method must be one of {PEFT_METHODS}, but got {method!r}.")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, but got {rank}.")
    common: dict[str, Any] = {"target_modules": targets, **options}
    if method in ("miss", "bat"):
        return peft.MissConfig(r=rank, init_weights="bat" if method == "bat" else True, **common)
    if method == "randlora":
        return peft.RandLoraConfig(r=rank, randlora_alpha=alpha, **common)
    if method == "adalora":
        first = rank + max(1, rank // 2)
        return peft.AdaLoraConfig(init_r=first, target_r=rank, lora_alpha=alpha, **common)
    if method == "corda":
        from peft.tuners.lora.config import CordaConfig

        common["corda_config"] = CordaConfig(corda_method="kpm")
    if method == "eva":
        common["eva_config"] = peft.EvaConfig(rho=1.0)
    common["init_lora_weights"] = True if method == "lora" else method
    return peft.LoraConfig(r=rank, lora_alpha=alpha, **common)


def _targets(model: nn.Module) -> list[str]:
    """Return how PEFT names all linear layers but the head: the last parts of their names."""
    head = head_of(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != head]
    return sorted({name.rsplit(".", 1)[-1] for name in linear})


def _rows(inputs: Any, model_inputs: Any, name: str) -> Tensor:
    """Return a layer's inputs as rows: no token is masked."""
    x = cast(Tensor, inputs[0] if isinstance(inputs, tuple) else inputs)
    return x.reshape(-1, x.shape[-1])


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of tied weights, which these adapters leave tied, and uses deprecated names."""
    with warnings.catch_warnings():
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


class PeftTune(Method):
    """HF PEFT's adapters on a small language model (LoRA, AdaLoRA, MiSS, EVA, ...).

    The network is the artifact "language_net": stories260K on the task "stories", and elsewhere a
    small Llama trained on the task's own training windows for a while.
    """

    name = "peft"
    task_type: ClassVar[type[Task]] = Sequences
    needs = ("language_net",)
    uses_grads = True
    space = Space(
        lr=learning_rate(3e-3),
        weight_decay=DECAY,
        method=Choice(*PEFT_METHODS, default="lora", doc="which of PEFT's methods"),
        rank=Int(1, 32, log=True, default=4, doc="rank r"),
        alpha=Int(1, 64, log=True, default=8, doc="alpha, where the method has it"),
        total=Int(10, 100_000, log=True, default=250, doc="steps of the run, for AdaLoRA"),
        warm_up=Float(0.0, 0.5, default=0.1, doc="share of the run before AdaLoRA prunes"),
        batch=Int(1, 256, log=True, default=16, doc="windows of a batch"),
    ).own(lr="sampler")

    tuner: nn.Module

    def network(self) -> nn.Module:
        """Return the pretrained network."""
        return cast(nn.Module, self.setting.artifacts["language_net"])

    def batch_size(self, hparams: Mapping[str, Any]) -> int:
        """The space's "batch"."""
        return cast(int, hparams["batch"])

    def optimizer(self, hyper: Callable[[str], Value]) -> Optimizer:
        """Adam with the space's "lr"."""
        return Adam(lr=hyper("lr"), eps=1e-6)

    def attach(self, model: nn.Module) -> None:
        """Let PEFT put its adapters on, and start them from data where the method does."""
        import peft

        c = self.setting.constants
        options: dict[str, Any] = {}
        if c["method"] == "adalora":
            total, first = c["total"], round(c["warm_up"] * c["total"])
            options = {"total_step": total, "tinit": first, "tfinal": total // 4}
        config = peft_config(c["method"], c["rank"], c["alpha"], _targets(model), **options)
        inner = cast(Any, model).model
        with _quiet():
            if c["method"] == "corda":
                from peft.tuners.lora.corda import preprocess_corda

                preprocess_corda(inner, config, run_model=lambda: self._run(inner))
            wrapped = peft.get_peft_model(inner, config)
            if c["method"] == "eva":
                peft.initialize_lora_eva_weights(
                    wrapped,
                    self._batches(),
                    forward_fn=lambda m, batch: m(input_ids=batch["input_ids"]),
                    prepare_model_inputs_fn=None,
                    prepare_layer_inputs_fn=_rows,
                    show_progress_bar=False,
                )
        for name, parameter in wrapped.named_parameters():
            if "ranknum" in name:  # a constant of AdaLoRA's, which PEFT marks as trained
                parameter.requires_grad_(False)
        cast(Any, model).model = wrapped
        self.tuner = cast(Any, wrapped).base_model

    def _batches(self) -> list[dict[str, Tensor]]:
        x = self.setting.task.split("train")["x"][:64]
        return [{"input_ids": x[i : i + 16]} for i in range(0, len(x), 16)]

    def _run(self, model: nn.Module) -> None:
        with torch.no_grad():
            for row in self.setting.task.split("train")["x"][:16]:
                model(input_ids=row[None])  # CorDA fails on several sequences at once

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor | None:
        """½ λ ‖θ‖², and AdaLoRA's orthogonality."""
        trained = [p for n, p in model.named_parameters() if n in self.trained]
        half = half_squares(hparams["weight_decay"], trained)
        if self.setting.constants["method"] != "adalora":
            return half
        terms = []
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                rows = p if "lora_A" in name else p.T
                gram = rows @ rows.T
                identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
                terms.append((gram - identity).square().sum())
        weight: float = cast(Any, self.tuner).peft_config["default"].orth_reg_weight
        return half + weight * torch.stack(terms).mean()

    def after_step(self, state: State) -> None:
        """Let PEFT's AdaLoRA follow importances and prune."""
        if self.setting.constants["method"] != "adalora" or state.grads is None:
            return
        named = dict(state.model.named_parameters())
        for name, value in state.params.items():
            named[name].copy_(value)
            named[name].grad = state.grads[name].clone()
        with _quiet():
            cast(Any, self.tuner).update_and_allocate(state.step)
        for name, value in state.params.items():
            value.copy_(named[name])
            named[name].grad = None

    def finish(self, model: nn.Module, hparams: Mapping[str, Any]) -> nn.Module:
        """Merge the adapters by PEFT's own means."""
        with _quiet():
            cast(Any, model).model = cast(Any, model).model.merge_and_unload()
        return model
