"""What `attach` refuses around other parametrizations, trained weights and attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from adapters.reparam import attach, maps, merge
from adapters.reparam.base import Start
from adapters.weights import EVA, HUT, LoRA

D = torch.float64


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8))


@pytest.mark.parametrize("train", ["*", "0.*", ["2.bias", "0.weight"]])
def test_a_mapped_weight_is_never_trained(train: str | list[str]) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"train: .* matches 0.weight, which a map keeps frozen"):
        attach(model, LoRA(2), "0", train=train)
    assert not maps(model)
    attach(model, LoRA(2), "0", train=["*.bias", "2.*"])
    assert not model[0].parametrizations["weight"].original.requires_grad  # type: ignore[union-attr]
    assert model[2].weight.requires_grad


def test_other_parametrizations_are_refused_on_targets_and_kept_elsewhere() -> None:
    model = net()
    weight_norm(model[0])
    with pytest.raises(ValueError, match="0: its weight has a parametrization already"):
        attach(model, LoRA(2), "0")
    attach(model, LoRA(2), "2")
    merge(model)
    assert "0.parametrizations.weight.original0" in model.state_dict()
    assert "2.weight" in model.state_dict()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, named: bool = False) -> Tensor:
        if named:
            return self.inner(value=key, key=key, query=query, need_weights=False)[0]  # type: ignore[no-any-return]
        return self.inner(query, key, key, need_weights=False)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("named", [False, True])
def test_inputs_of_attention_are_those_of_one_sequence(named: bool) -> None:
    query, key = torch.randn(4, 5, 8), torch.randn(4, 6, 8)
    with pytest.raises(ValueError, match="from one sequence to another"):
        attach(Attention(), EVA(2), "inner", calibrate=lambda m: m(query, key, named))
    model = Attention()
    attach(model, EVA(2), "inner", calibrate=lambda m: m(query, query, named))
    rows = query.reshape(-1, 8)
    _, _, vt = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    cosines = (maps(model)["inner"].parts["V"] @ vt[:2].T).abs()
    assert torch.allclose(cosines, torch.eye(2), atol=1e-5)


@pytest.mark.parametrize("form", ["residual", "direct"])
def test_weight_decay_of_hut_pulls_towards_the_pretrained_weight(form: str) -> None:
    """θ → 0 gives W₀; the direct form is W₀ ⊙ M_A M_B with its column and row of ones."""
    w = torch.randn(6, 9, dtype=D, generator=torch.Generator().manual_seed(0))
    reparam = HUT(3, form, scale=1.0, std=0.4)  # type: ignore[arg-type]
    made = reparam.start(Start("layer", w, generator=torch.Generator().manual_seed(1)))
    noise = made.fixed["noise"]
    a = torch.randn(6, 3, dtype=D, generator=torch.Generator().manual_seed(2))
    b = torch.randn(3, 9, dtype=D, generator=torch.Generator().manual_seed(3))
    new = reparam.weight(w, {"A": a, "B": b, "noise": noise})
    left, right = a.clone(), b + 0.4 * noise
    if form == "direct":
        left[:, 0] += 1
        right[0] += 1
        assert torch.allclose(new, w * (left @ right), atol=1e-12)
    else:
        assert torch.allclose(new, w * (1 + left @ right), atol=1e-12)
    decayed = {"A": 0 * a, "B": 0 * b, "noise": noise}
    assert torch.equal(reparam.weight(w, decayed), w)
