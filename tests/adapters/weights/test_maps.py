"""What every weight map must do, whatever it is, on every kind of layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.functional import copy_module
from adapters.reparam import Reparam, adaptable, attach, configured, maps, merge, n_trained
from adapters.weights import EVA, HUT, SORSA, AdaLoRA, ALLoRA, LoRA, LoRASB, MiSS, SVFit
from adapters.weights.eva import redistribute

OUT, IN, R = 8, 12, 4
"""Outputs, inputs and rank of the layer under test."""

MAPS: dict[str, tuple[Reparam, int, int]] = {
    "lora": (LoRA(R, scale=0.7), R * (OUT + IN), R),
    "miss": (MiSS(R), R * OUT, R),
    "mini": (MiSS(R, "mini", mini_rows=2), R * 2, R),
    "bat": (MiSS(R, "bat"), OUT * R, OUT),
    "sorsa": (SORSA(R), R * (OUT + IN) + R, 2 * R),
    "eva": (EVA(R), R * (OUT + IN), R),
    "hut": (HUT(R), R * (OUT + IN), OUT),
    "hut direct": (HUT(R, "direct", std=0.3), R * (OUT + IN), OUT),
    "adalora": (AdaLoRA(R), R * (OUT + IN) + R, R),
    "svfit": (SVFit(R), R, R),
    "svfit log": (SVFit(form="log"), OUT, OUT),
    "allora": (ALLoRA(R), R * (OUT + IN), R),
    "lora-sb": (LoRASB(R, first_step=0.0), R * R, R),
    "lora-xs": (LoRASB(R, "weight", first_step=0.0), R * R, R),
}
"""A map, the size of its θ on one layer, and a bound of the rank of its increment."""


def calibrate(model: nn.Module) -> Tensor:
    x = torch.randn(40, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out: Tensor = model(x)
    return out.square().mean()


def layer(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, 3)).double()


def on_layer(reparam: Reparam) -> nn.Sequential:
    model = layer()
    attach(model, reparam, "0", train="2.*", calibrate=calibrate)
    return model


def shake(model: nn.Module) -> None:
    """Move everything that is trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.add_(0.3 * noise.to(p.dtype))


@pytest.mark.parametrize("name", MAPS)
def test_invariants(name: str) -> None:
    reparam, size, rank = MAPS[name]
    before, model = layer(), on_layer(reparam)
    w0 = before[0].weight.detach()
    assert torch.equal(model[0].weight, w0), "not the identity at the start"
    assert n_trained(model) == size + sum(p.numel() for p in before[2].parameters())
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert set(frozen) == {"0.bias", "0.parametrizations.weight.original"}

    x = torch.randn(5, IN, dtype=torch.float64)
    grads = torch.autograd.grad(
        model(x).square().sum(), [p for p in model.parameters() if p.requires_grad]
    )
    assert all(g.isfinite().all() for g in grads)
    shake(model)
    change = model[0].weight.detach() - w0
    assert float(change.abs().max()) > 1e-4
    assert int(torch.linalg.matrix_rank(change)) <= rank
    assert all(torch.equal(dict(model.named_parameters())[n], v) for n, v in frozen.items())

    (only,) = maps(model).values()
    only.gate = 0.0
    assert torch.equal(model[0].weight, w0), "gate 0 is the pretrained weight"
    only.gate = 0.5
    assert torch.allclose(model[0].weight, w0 + 0.5 * change, atol=1e-14)
    only.gate = 1.0

    twin, again = copy.deepcopy(model), on_layer(reparam)
    again.load_state_dict(model.state_dict())
    expected = model(x)
    assert torch.equal(twin(x), expected)
    assert torch.equal(again(x), expected)
    merged = merge(copy_module(model))
    assert set(merged.state_dict()) == set(before.state_dict())
    assert torch.allclose(merged(x), expected, atol=1e-12)
    assert torch.equal(merge(twin)(x), merged(x))
    assert torch.equal(model(x), expected), "merging a copy, of any kind, leaves the original"


@pytest.mark.parametrize("name", ["lora", "miss", "sorsa", "hut", "svfit", "adalora"])
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: nn.Conv2d(3, 8, 3, groups=1), (2, 3, 6, 6)),
        (lambda: nn.Conv2d(8, 8, 3, groups=2), (2, 8, 6, 6)),
        (lambda: nn.Conv1d(4, 8, 3), (2, 4, 9)),
        (lambda: Conv1D(8, 12), (2, 12)),
    ],
    ids=["conv2d", "grouped", "conv1d", "Conv1D"],
)
def test_layers(name: str, make: Callable[[], nn.Module], inputs: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Flatten())
    x = torch.randn(inputs)
    expected = model(x)
    attach(model, MAPS[name][0])
    assert torch.equal(model(x), expected)
    shake(model)
    moved = model(x)
    assert not torch.allclose(moved, expected, atol=1e-3)
    assert torch.allclose(merge(model)(x), moved, atol=1e-5)


def test_statistics_of_convolutions_are_those_of_the_folded_matrix() -> None:
    """The recorded rows times the folded weight give the layer's output."""
    from adapters.reparam.calibrate import collect

    torch.manual_seed(0)
    for conv, x in [
        (nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), torch.randn(2, 3, 7, 7)),
        (nn.Conv1d(3, 5, 3, padding=1, dilation=2, bias=False), torch.randn(2, 3, 9)),
    ]:
        model = nn.Sequential(conv)
        given = collect(model, adaptable(model), frozenset({"inputs"}), lambda m, x=x: m(x).sum())
        rows, _ = given["0"]
        assert rows is not None
        product = rows @ conv.weight.flatten(1).T
        out = conv(x).flatten(2).transpose(1, 2).reshape(-1, 5)
        assert torch.allclose(product, out, atol=1e-5)


def test_transformer_layers_train_and_evaluate() -> None:
    """Input projections of attention, in both modes of the encoder layer, against the merge."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x = torch.randn(3, 5, 16)
    expected = model.eval()(x)
    attach(model, LoRA(2))
    assert {"self_attn", "self_attn.out_proj", "linear1", "linear2"} == set(maps(model))
    assert torch.allclose(model(x), expected, atol=1e-6)
    shake(model)
    training, evaluating = model.train()(x), model.eval()(x)
    assert torch.allclose(training, evaluating, atol=1e-5)
    assert torch.allclose(merge(model)(x), evaluating, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MAPS)
def test_maps_on_half_precision(name: str, dtype: torch.dtype) -> None:
    """Attach, train, merge.  torch decomposes in float32 and float64 only, so float32 is used."""
    model = layer().to(dtype)
    before = model[0].weight.detach().clone()
    x = torch.randn(40, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    attach(model, MAPS[name][0], "0", calibrate=lambda m: m(x).float().square().mean())
    assert torch.equal(model[0].weight, before)
    if name == "svfit log":  # all of the spectrum
        u, sigma, vt = (maps(model)["0"].parts[k].float() for k in ("U", "S0", "V"))
        assert torch.allclose((u * sigma) @ vt, before.float(), atol=2e-2)
    trained = [p for p in model.parameters() if p.requires_grad]
    penalty = maps(model)["0"].penalty()
    loss = model(x).float().square().mean() + (0.0 if penalty is None else penalty)
    grads = torch.autograd.grad(loss, trained)
    assert {p.dtype for p in model.parameters()} == {g.dtype for g in grads} == {dtype}
    assert all(g.isfinite().all() for g in grads)
    assert any(g.any() for g in grads)
    shake(model)
    expected = model(x)
    assert not torch.allclose(model[0].weight, before, atol=1e-3)
    assert torch.equal(merge(model)(x), expected)
    assert model[0].weight.dtype == dtype


def test_redistributed_ranks_on_half_precision_are_those_of_the_rounded_inputs() -> None:
    model, half = layer().float(), layer().to(torch.bfloat16)
    x = torch.randn(40, IN, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    found = redistribute(half, EVA(2), ["0"], lambda m: m(x))
    assert found == redistribute(model, EVA(2), ["0"], lambda m: m(x.float()))


def test_attention_gives_its_input_projection_rows_and_its_output_projection_none() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(4, 9, 16)
    with pytest.raises(ValueError, match=r"self_attn.out_proj: it got no input.*leave it out"):
        attach(model, EVA(2), calibrate=lambda m: m(x))
    assert len(attach(model, EVA(2), ["self_attn", "linear*"], calibrate=lambda m: m(x))) == 3


def test_only_the_maps_that_need_data_ask_for_them() -> None:
    assert list(attach(layer(), LoRASB(2, "weight"), "0")) == ["0"]


def test_parts_of_an_adapter_of_peft_are_refused_and_the_rest_is_not() -> None:
    import peft

    wrapped = peft.get_peft_model(layer(), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"base_model.model.0.base_layer: it is part of .*HF PEFT"):
        attach(wrapped, LoRA(2))
    assert not maps(wrapped)
    assert list(attach(wrapped, LoRA(2), "*.2")) == ["base_model.model.2"]
    assert (
        len(
            attach(
                peft.get_peft_model(
                    layer(), peft.LoraConfig(r=2, target_modules=["0"])
                ).merge_and_unload(),
                LoRA(2),
            )
        )
        == 2
    )


def test_embeddings_only_by_name() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8))
    assert list(attach(copy.deepcopy(model), LoRA(2))) == ["1"]
    assert list(attach(model, LoRA(2), "0")) == ["0"]
    shake(model)
    x = torch.arange(20)
    assert torch.allclose(merge(copy_module(model))(x), model(x), atol=1e-6)


def test_settings_can_be_tensors_for_a_while() -> None:
    model = on_layer(LoRA(R))
    shake(model)
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, IN, dtype=torch.float64)
    with configured(model, {"scale": scale, "lr": 1.0}):
        loss = model(x).square().sum()
    (grad,) = torch.autograd.grad(loss, scale)

    def at(value: float) -> float:
        with configured(model, {"scale": value}), torch.no_grad():
            return float(model(x).square().sum())

    assert float(grad) == pytest.approx((at(0.3 + 1e-6) - at(0.3 - 1e-6)) / 2e-6, rel=1e-7)
    assert next(iter(maps(model).values())).reparam == LoRA(R)


def test_generators_decide() -> None:
    made = []
    for seed in (1, 1, 2):
        model = layer()
        attach(model, LoRA(R), "0", generator=torch.Generator().manual_seed(seed))
        made.append(maps(model)["0"].parts["A"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.out.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attach(layer(), LoRA(9), "0"), "0: rank must lie in 1 ... 8.*but got 9"),
        (lambda: attach(layer(), SVFit(0), "0"), "rank must lie in 1 ... 8.*but got 0"),
        (lambda: attach(layer(), MiSS(5, "bat"), "0"), "must divide 8 and 12.*but got 5"),
        (lambda: attach(layer(), MiSS(4, "mini", 3), "0"), "mini_rows must divide 8.*but got 3"),
        (lambda: attach(layer(), MiSS(4, "bone"), "0"), "variant must be"),  # type: ignore[arg-type]
        (
            lambda: attach(layer(), LoRA(2), "encoder.*"),
            "nothing that fits matches 'encoder.*'.*0, 2",
        ),
        (lambda: attach(layer(), LoRA(2), "1"), "nothing that fits matches '1'.*0, 2"),
        (lambda: attach(layer(), LoRA(2), []), "must not be empty"),
        (lambda: attach(layer(), {}), "must not be empty"),
        (lambda: attach(layer(), LoRA(2), "0", train="head"), "train: nothing that fits.*0.weight"),
        (lambda: attach(nn.ReLU(), LoRA(2)), "ReLU has no layer"),
        (lambda: attach(Tied(), LoRA(2), "out"), "shared by embedding.weight, out.weight"),
        (lambda: attach(on_layer(LoRA(2)), LoRA(2)), "carries weight maps already, on 0"),
        (lambda: attach(layer(), {"0": LoRA(2)}, "0"), "targets must be None"),
        (lambda: merge(layer()), "carries no weight maps"),
        (lambda: attach(layer(), EVA(2), "0"), "needs calibrate="),
        (lambda: attach(layer(), EVA(2), "0", calibrate=lambda m: None), "0: it got no input"),
        (lambda: attach(layer(), LoRASB(2), "0", calibrate=lambda m: None), "must return a scalar"),
        (
            lambda: attach(layer(), EVA(4), "0", calibrate=lambda m: m(torch.ones(4, IN).double())),
            "0: 4 components need at least 5 calibration rows, but got 4",
        ),
        (
            lambda: attach(
                layer(), EVA(2), "0", calibrate=lambda m: m(torch.full((9, IN), torch.nan).double())
            ),
            "0: its inputs or gradients on calibration data are not finite",
        ),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_attachment_leaves_the_model_alone() -> None:
    model = layer()
    with pytest.raises(ValueError, match="rank"):
        attach(model, {"2": LoRA(2), "0": LoRA(9)})
    assert not maps(model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="reparam must be a Reparam"):
        attach(model, LoRA)  # type: ignore[arg-type]
    quantized = nn.Sequential(nn.Linear(4, 4))
    quantized[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"floating weight, but it is torch.int8"):
        attach(quantized, LoRA(2))
