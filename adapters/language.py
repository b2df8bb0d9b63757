"""Small pretrained language models as artifacts."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters import artifacts
from adapters.tasks import Sequences, Task
from adapters.tasks.folder import data_file
from hypergrad import seeded

__all__ = ["Logits", "llama"]


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


def llama(
    n_tokens: int,
    *,
    width: int = 32,
    inside: int = 64,
    layers: int = 2,
    key_value_heads: int = 2,
    seed: int = 0,
) -> Any:
    """Return a small Llama of transformers with 4 heads, randomly initialized.

    Args:
        n_tokens: size of the vocabulary.
        width: of the hidden states.
        inside: width inside the MLPs.
        layers: their number.
        key_value_heads: heads of keys and values.
        seed: of the weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=n_tokens,
        hidden_size=width,
        intermediate_size=inside,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = "eager"  # the fused ones have no second derivative
    with seeded(seed):
        return LlamaForCausalLM(config)


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


@artifacts.register("language_net")
def language_net(task: Task, seed: int) -> nn.Module:
    """stories260K on the task "stories"; elsewhere a Llama of 2 layers, width 32, trained a little.

    100 steps of Adam at 1e-2 on 32 training windows each.
    """
    if not isinstance(task, Sequences):
        raise ValueError(
            f"language_net needs a task of type Sequences, but {task.name!r} is a "
            f"{type(task).__name__}."
        )
    if task.name == "stories":
        pretrained: nn.Module = stories_net(task, seed)
        return pretrained
    inner = llama(task.n_tokens, seed=seed)
    model: nn.Module = Logits(inner.to(task.device, task.dtype))
    data, generator = task.split("train"), torch.Generator().manual_seed(seed)
    trained = list(model.parameters())
    optimizer = torch.optim.Adam(trained, lr=1e-2, foreach=False)
    for _ in range(100):
        rows = torch.randint(len(data["x"]), (32,), generator=generator).to(data["x"].device)
        with torch.enable_grad():
            batch = {"y": data["y"][rows]}
            loss = task.measure(model(data["x"][rows]), batch)["loss"].mean()
            grads = torch.autograd.grad(loss, trained)
        for parameter, grad in zip(trained, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
    optimizer.zero_grad()
    return model
