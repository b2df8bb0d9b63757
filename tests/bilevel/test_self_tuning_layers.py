"""Response layers: against plain layers, against a loop over examples, and against differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bilevel import Grad, Space
from bilevel.self_tuning import LockedDropout, convert, squared_norm
from bilevel.self_tuning.convert import Converted
from bilevel.self_tuning.layout import Layout
from bilevel.self_tuning.scan import Hidden, gru_scan, lstm_scan

ROWS, N = 4, 3
SPACE = Space(a=Grad(0.1, low=0.0, high=0.9), b=Grad([1.0, 2.0], low=0.0, shape=(2,)))
LAYOUT = Layout.of(SPACE, ["a", "b"])


class Attend(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -1] = True
        memory = x.flip(1) if self.need_weights else x
        out, weights = self.attention(
            x, memory, memory, padding, need_weights=self.need_weights, attn_mask=mask
        )
        return out if weights is None else torch.cat([out, weights], -1)


class First(nn.Module):
    """The outputs of a recurrent layer, and its final state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.layer(x)
        states = state if isinstance(state, tuple) else (state,)
        return torch.cat([out.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


def words(*shape: int) -> Tensor:
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(5))


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(5, 3), numbers(ROWS, 5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), numbers(ROWS, 7, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), numbers(ROWS, 2, 6)),
    "conv2d": (
        lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, padding_mode="circular"),
        numbers(ROWS, 2, 6, 6),
    ),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=0), words(ROWS, 7)),
    "lstm": (lambda: First(nn.LSTM(3, 4, 2, batch_first=True)), numbers(ROWS, 5, 3)),
    "gru": (lambda: First(nn.GRU(3, 4, 2, batch_first=True)), numbers(ROWS, 5, 3)),
    "gru without bias": (
        lambda: First(nn.GRU(3, 4, batch_first=True, bias=False)),
        numbers(ROWS, 5, 3),
    ),
    "attention": (lambda: Attend(need_weights=False), numbers(ROWS, 5, 6)),
    "cross-attention": (lambda: Attend(need_weights=True), numbers(ROWS, 5, 6)),
    "network": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(8, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 2),
        ),
        numbers(ROWS, 1, 6, 6),
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
        numbers(ROWS, 5, 6),
    ),
}  # fmt: skip


def converted(name: str, **options: Any) -> tuple[nn.Module, Converted, Tensor]:
    torch.manual_seed(1)
    make, x = MODULES[name]
    plain = make().double()
    found = convert(plain, LAYOUT, **options)
    generator = torch.Generator().manual_seed(2)
    parameters = dict(found.module.named_parameters())
    for key in found.response_shapes():
        with torch.no_grad():
            parameters[key].normal_(0.0, 0.5, generator=generator)
    return plain, found, x


def output(found: Converted, x: Tensor, shift: Tensor | None) -> Tensor:
    with found.perturbation.active(shift, {}):
        out: Tensor = found.module(x)
    return out


def materialized(found: Converted, shift: Tensor) -> nn.Module:
    """The plain network with the weights at one shift."""
    plain = found.export()
    parameters = dict(plain.named_parameters())
    for path, layer in found.layers.items():
        for name, value in layer.effective(shift).items():
            with torch.no_grad():
                parameters[f"{path}.{name}" if path else name].copy_(value)
    return plain.train(found.module.training)


@pytest.mark.parametrize("name", MODULES)
def test_without_a_shift_it_is_the_plain_module(name: str) -> None:
    plain, found, x = converted(name)
    for mode in (False, True):  # training moves the statistics of BatchNorm
        plain.train(mode)
        found.module.train(mode)
        expected = plain(x)
        assert torch.allclose(output(found, x, None), expected, atol=1e-14)
        zero = torch.zeros(ROWS, N, dtype=torch.float64)
        assert torch.allclose(output(found, x, zero), expected, atol=1e-14)
        assert torch.allclose(found.export().train(mode)(x), expected, atol=1e-14)


@pytest.mark.parametrize("name", MODULES)
def test_per_example_shifts_are_a_loop_over_networks(name: str) -> None:
    """Check 8.5: one call with B shifts, and B plain networks with materialized weights."""
    _, found, x = converted(name)
    found.module.eval()
    shifts = numbers(ROWS, N)
    together = output(found, x, shifts)
    for b in range(ROWS):
        one = materialized(found, shifts[b]).eval()(x)[b]
        assert torch.allclose(together[b], one, atol=1e-12), b
    shared = output(found, x, shifts[0])
    assert torch.allclose(shared, materialized(found, shifts[0]).eval()(x), atol=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    if "attention" not in name:  # the mask of its first row is not permuted
        assert torch.allclose(output(found, x[order], shifts[order]), together[order], atol=1e-12)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_the_tangent_is_the_derivative_at_zero_shift(name: str, training: bool) -> None:
    """Against central differences of the network in t, at the shift t·s."""
    _, found, x = converted(name)
    found.module.train(training)
    shifts, t = numbers(ROWS, N), 1e-5
    up, down = (output(found, x, t * sign * shifts) for sign in (1, -1))
    with forward_ad.dual_level(), found.perturbation.active(shifts, {}, linearized=True):
        value, tangent = forward_ad.unpack_dual(found.module(x))
    assert tangent is not None
    assert torch.allclose(value, output(found, x, None), atol=1e-14)
    assert torch.allclose(tangent, (up - down) / (2 * t), atol=1e-8)


@pytest.mark.parametrize("name", ["linear", "conv2d", "lstm", "gru", "attention", "network"])
def test_derivatives_of_the_linearized_outputs(name: str) -> None:
    """d/dΘ of ⟨g, ŷ + J Θ s⟩ against differences in Θ of the tangent: no Θ is missed."""
    _, found, x = converted(name)
    shifts, g = numbers(ROWS, N), torch.randn_like(output(converted(name)[1], x, None))
    parameters = dict(found.module.named_parameters())
    names = list(found.response_shapes())
    for key in names:
        parameters[key].requires_grad_()
    for key in parameters:
        if key not in names:
            parameters[key].requires_grad_(False)

    def linear_part() -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level(), found.perturbation.active(shifts, {}, linearized=True):
            value, tangent = forward_ad.unpack_dual(found.module(x))
            assert tangent is not None
            return value, tangent.detach()

    value, _ = linear_part()
    grads = torch.autograd.grad((value * g).sum(), [parameters[k] for k in names])
    t = 1e-6
    for key, grad in zip(names, grads, strict=True):
        direction = torch.randn_like(parameters[key])
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameters[key].add_(sign * t * direction)
            ends.append(float((linear_part()[1] * g).sum()))
            with torch.no_grad():
                parameters[key].sub_(sign * t * direction)
        assert float((grad * direction).sum()) == pytest.approx(
            (ends[0] - ends[1]) / (2 * t), rel=1e-6, abs=1e-7
        ), key


@pytest.mark.parametrize("gates", [3, 4])
def test_derivatives_of_the_time_loops(gates: int) -> None:
    """Outputs and final states against central differences, in all inputs."""
    rows, steps, size = 2, 3, 2
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    into, states = leaf(rows, steps, gates * size), [leaf(rows, size), leaf(rows, size)]
    weights = [leaf(gates * size, size), leaf(gates * size, size)]
    vectors = [leaf(rows, gates * size), leaf(gates * size), leaf(rows, gates * size)]

    def lstm(into: Tensor, h: Tensor, c: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
        out, end, _, _ = lstm_scan(into, h, c, Hidden(*hidden))
        return out, end

    def gru(into: Tensor, h: Tensor, c: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
        return gru_scan(into, h, Hidden(*hidden))[0], c

    function = gru if gates == 3 else lstm
    assert torch.autograd.gradcheck(function, (into, *states, *weights, *vectors))


@pytest.mark.parametrize(("d_in", "d_out"), [(5, 3), (1, 1), (7, 2)])
def test_number_of_parameters(d_in: int, d_out: int) -> None:
    """D_out (2 D_in + n) + D_out (2 + n), for weight and bias."""
    found = convert(nn.Linear(d_in, d_out), LAYOUT)
    total = sum(p.numel() for p in found.module.parameters())
    assert total == d_out * (2 * d_in + N) + d_out * (2 + N)


def test_a_convolution_with_a_1x1_kernel_is_linear() -> None:
    linear = convert(nn.Linear(5, 3).double(), LAYOUT)
    conv = convert(nn.Conv2d(5, 3, 1).double(), LAYOUT)
    theirs = dict(conv.module.named_parameters())
    for name, value in linear.module.named_parameters():
        with torch.no_grad():
            value.normal_()
            theirs[name].copy_(value.view_as(theirs[name]))
    x, shifts = numbers(ROWS, 5), numbers(ROWS, N)
    one = output(conv, x[..., None, None], shifts)[..., 0, 0]
    assert torch.allclose(one, output(linear, x, shifts), atol=1e-13)


@pytest.mark.parametrize("shared", [True, False])
def test_squared_norm_without_materializing(shared: bool) -> None:
    plain, found, _ = converted("network")
    assert torch.allclose(squared_norm(found.module), squared_norm(plain))
    assert torch.allclose(
        squared_norm(plain, biases=True), sum(p.square().sum() for p in plain.parameters())
    )
    shifts = numbers(N) if shared else numbers(ROWS, N)
    with found.perturbation.active(shifts, {}):
        norms = squared_norm(found.module, biases=True)
    for b, shift in enumerate(shifts[None] if shared else shifts):
        expected = squared_norm(materialized(found, shift), biases=True)
        assert torch.allclose(norms if shared else norms[b], expected, rtol=1e-12)


def test_a_tied_weight_counts_once_in_the_squared_norm() -> None:
    encoder, decoder = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    decoder.weight = encoder.weight
    net = nn.Sequential(encoder, decoder).double()
    assert torch.allclose(squared_norm(net), net[0].weight.square().sum())
    found = convert(net, LAYOUT)
    with torch.no_grad():
        for key in found.response_shapes():
            nn.init.normal_(found.module.get_parameter(key))
    shift = numbers(N)
    with found.perturbation.active(shift, {}):
        norm = squared_norm(found.module)
    uses = [layer.effective(shift)["weight"].square().sum() for layer in found.layers.values()]
    assert torch.allclose(norm, (uses[0] + uses[1]) / 2)


def rates(*values: float) -> dict[str, Tensor]:
    return {"a": torch.tensor(values, dtype=torch.float64)}


def test_dropout_has_one_rate_per_example() -> None:
    plain = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    found = convert(plain, LAYOUT, dropout={"0": "a"})
    x = torch.ones(3, 40_000, dtype=torch.float64)
    with found.perturbation.active(None, rates(0.0, 0.25, 0.8)):
        out = found.module[0](x)  # type: ignore[index]
    assert torch.equal(out[0], x[0])
    for row, rate in ((1, 0.25), (2, 0.8)):
        share = (out[row] == 0).double().mean().item()
        assert share == pytest.approx(rate, abs=0.01)  # four standard deviations
        assert torch.allclose(out[row].max(), torch.tensor(1 / (1 - rate)).double())
    assert torch.equal(found.module[0].eval()(x), x)  # type: ignore[index]


@pytest.mark.parametrize(
    ("layer", "shape", "constant"),
    [
        (nn.Dropout2d(0.1), (6, 5, 3, 3), (2, 3)),
        (nn.Dropout1d(0.1), (6, 5, 4), (2,)),
        (LockedDropout(0.1), (6, 4, 5), (1,)),
    ],
)
def test_masks_of_channels_and_of_time(
    layer: nn.Module, shape: tuple[int, ...], constant: tuple[int, ...]
) -> None:
    found = convert(nn.Sequential(layer, nn.Linear(2, 2)), LAYOUT, dropout={"0": "a"})
    torch.manual_seed(0)
    with found.perturbation.active(None, {"a": torch.full((6,), 0.5)}):
        out = found.module[0](torch.ones(shape))  # type: ignore[index]
    assert 0 < (out == 0).float().mean() < 1
    assert torch.equal(out.amin(constant), out.amax(constant))
    torch.manual_seed(0)
    plain = layer(torch.ones(shape))
    assert torch.equal(plain.amin(constant), plain.amax(constant))


def test_dropconnect_has_one_mask_for_weight_and_response() -> None:
    layout = Layout.of(SPACE, ["a", "b"], per_batch=["a"])
    found = convert(nn.Linear(50, 20).double(), layout, dropconnect={"": "a"})
    layer = found.layers[""]
    with found.perturbation.active(None, {"a": torch.tensor(0.4)}):
        torch.nn.init.normal_(layer._parameters["response_weight"])  # type: ignore[arg-type]
        weight, response = layer.masked("weight")
    assert response is not None
    assert torch.equal(weight == 0, response == 0)
    assert 0.3 < (weight == 0).double().mean() < 0.5
    kept = weight != 0
    assert torch.allclose(weight[kept] * 0.6, layer.pair("weight")[0][kept])


def test_an_lstm_drops_hidden_weights_and_between_layers() -> None:
    lstm = nn.LSTM(3, 4, 2, batch_first=True).double()
    space = Space(a=Grad(0.1, low=0.0, high=0.9), c=Grad(0.1, low=0.0, high=0.9))
    layout = Layout.of(space, ["a", "c"], per_batch=["a"])
    found = convert(lstm, layout, dropconnect={"": "a"}, dropout={"": "c"})
    x = numbers(ROWS, 5, 3)
    values = {"a": torch.tensor(0.0), "c": torch.zeros(ROWS)}
    with found.perturbation.active(None, values):
        assert torch.allclose(found.module(x)[0], lstm(x)[0], atol=1e-13)
    for name in ("a", "c"):
        torch.manual_seed(0)
        with found.perturbation.active(None, {**values, name: torch.full_like(values[name], 0.5)}):
            changed = found.module(x)[0]
        assert not torch.allclose(changed, lstm(x)[0], atol=1e-3)
    torch.manual_seed(0)
    shift = torch.zeros(ROWS, 2, dtype=torch.float64)
    values = {"a": torch.tensor(0.5), "c": torch.zeros(ROWS)}
    outputs = []
    for s in (shift, shift[0], None):  # the loop and the fused kernels draw the same masks
        torch.manual_seed(0)
        with found.perturbation.active(s, values):
            outputs.append(found.module(x)[0])
    assert torch.allclose(outputs[0], outputs[1], atol=1e-13)
    assert torch.allclose(outputs[0], outputs[2], atol=1e-13)


def test_examples_must_stay_in_the_first_dimension() -> None:
    _, found, x = converted("linear")
    with pytest.raises(ValueError, match=r"got an input of \(8, 3\), but 4 examples are perturbed"):
        output(found, torch.cat([x, x]), numbers(ROWS, N))
    net = convert(nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), LAYOUT, dropout={"0": "a"})
    with (
        net.perturbation.active(None, rates(0.1, 0.2)),
        pytest.raises(ValueError, match="2 examples are perturbed"),
    ):
        net.module(torch.ones(3, 2))
    _, lstm, _ = converted("lstm")
    with pytest.raises(ValueError, match=r"LSTM needs a tensor of shape \(rows, time"):
        lstm.module(torch.ones(3, 3).double())
