"""A small pretrained language model as an artifact."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from adapters import artifacts
from adapters.tasks import Sequences, Task
from adapters.tasks.folder import data_file

__all__ = ["Logits"]


class Logits(nn.Module):
    """A Hugging Face language model as a map from token ids to logits.

    Args:
        model: whose call returns an object with "logits".
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (batch, length, tokens), of ids, shape (batch, length)."""
        return cast(Tensor, self.model(input_ids=x, use_cache=False).logits)


@artifacts.register("stories_net")
def stories_net(task: Task, seed: int) -> nn.Module:
    """stories260K: a Llama of 260,032 parameters trained on TinyStories; data folder."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    if not isinstance(task, Sequences) or task.n_tokens != 512:
        raise ValueError(
            f"stories_net needs a task of type Sequences with its 512 tokens, such as 'stories', "
            f"but {task.name!r} is a {type(task).__name__}."
        )
    config = LlamaConfig.from_json_file(str(data_file("stories260k", "config.json")))
    config._attn_implementation = "eager"  # the fused ones have no second derivative
    model: Any = LlamaForCausalLM(config)
    tied = {"lm_head.weight"}
    found = model.load_state_dict(
        load_file(str(data_file("stories260k", "model.safetensors"))), strict=False
    )
    if set(found.missing_keys) - tied or found.unexpected_keys:
        raise ValueError(f"stories260k/model.safetensors does not fit its config: {found}.")
    model.tie_weights()
    return Logits(model.to(task.device, task.dtype))
