"""Conversion: what is refused, tied weights, frozen and plain layers, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations

from bilevel import Grad, ModuleInner, SelfTuning, Space, tune
from bilevel.self_tuning import Layout, convert
from hypergrad import SGD

SPACE = Space(
    p=Grad(0.1, low=0.0, high=0.9),
    q=Grad([0.1, 0.2], low=0.0, high=0.9, shape=(2,)),
    full=Grad(0.1, low=0.0, high=1.0),
    free=Grad(0.1),
)
LAYOUT = Layout.of(SPACE, list(SPACE))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(7, 4)
        self.decoder = nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.encoder(x))
        return out


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


def test_the_plain_module_is_not_changed() -> None:
    plain = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    found = convert(plain, LAYOUT, dropout={"0": "p"})
    assert type(plain[1]) is nn.Linear
    assert type(plain[0]) is nn.Dropout
    for value in found.module.parameters():
        nn.init.ones_(value)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_an_exported_module_is_plain() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.drop = nn.Dropout(0.2)
            self.lstm = nn.LSTM(4, 6, 2, batch_first=True)
            self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
            self.out = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.lstm(self.drop(self.embed(x)))[0]
            out: Tensor = self.out(self.attend(h, h, h)[0])
            return out

    plain = Net().eval()
    found = convert(plain, LAYOUT, dropout={"drop": "p"})
    clone = found.export().eval()
    kinds = [type(m) for m in plain.modules()]
    assert [type(m) for m in clone.modules()] == kinds
    assert list(clone.state_dict()) == list(plain.state_dict())
    x = torch.randint(0, 5, (3, 4))
    assert torch.allclose(clone(x), plain(x), atol=1e-6)
    assert not list(set(map(id, clone.parameters())) & set(map(id, found.module.parameters())))


def test_tied_weights_are_found_and_stay_tied() -> None:
    found = convert(Tied(), LAYOUT)
    assert found.tied == (("encoder", "decoder"),)
    clone = found.export()
    assert clone.decoder.weight is clone.encoder.weight
    names = dict(found.module.named_parameters())
    assert names["encoder.response_weight"] is not names["decoder.response_weight"]


def test_a_layer_in_two_places_has_one_response() -> None:
    found = convert(Twice(), LAYOUT)
    assert list(found.layers) == ["a"]
    assert found.module.a is found.module.b
    assert found.tied == ()


def test_frozen_and_plain_layers_stay() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    net[3].bias.requires_grad_(False)
    found = convert(net, LAYOUT, plain=["1"])
    assert list(found.layers) == ["3"]
    assert found.layers["3"].responding == ("weight",)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (lambda: nn.BatchNorm1d(3), {}, "has no layer that can respond"),
    (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), {}, "parametrized weights"),
    (lambda: nn.LSTM(2, 2), {}, "LSTM with batch_first=False cannot respond; it must be True"),
    (lambda: nn.GRU(2, 2, batch_first=True, bidirectional=True), {}, "bidirectional=True"),
    (lambda: nn.LSTM(2, 3, batch_first=True, proj_size=2), {}, "proj_size=2"),
    (lambda: nn.MultiheadAttention(4, 2), {}, "MultiheadAttention with batch_first=False"),
    (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, batch_first=True),
        {},
        "qkv_same_embed_dim=False",
    ),
    (
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True),
        {},
        "with add_bias_kv",
    ),
    (lambda: nn.Embedding(3, 2, max_norm=1.0), {}, "max_norm=1.0"),
    (lambda: nn.Linear(2, 2), {"plain": ["x"]}, "no module 'x'"),
    (lambda: nn.Linear(2, 2), {"dropout": {"": "p"}}, "'' is no dropout layer"),
    (lambda: nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), {"dropout": {"0": "x"}}, "not owned by"),
    (lambda: nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), {"dropout": {"0": "q"}}, "an element"),
    (
        lambda: nn.Sequential(nn.Dropout(), nn.Linear(2, 2)),
        {"dropout": {"0": "full"}},
        "low and high < 1, because what is kept is divided by 1 - rate",
    ),
    (
        lambda: nn.Sequential(nn.Dropout(), nn.Linear(2, 2)),
        {"dropout": {"0": "free"}},
        "high=None",
    ),
    (lambda: nn.Linear(2, 2), {"dropconnect": {"": "p"}}, "add it to per_batch"),
    (lambda: nn.Linear(2, 2), {"dropconnect": {"z": "p"}}, "'z' does not respond"),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_what_cannot_be_converted(make: Any, options: dict[str, Any], message: str) -> None:
    module = make()
    with pytest.raises(ValueError, match=message):
        convert(module, LAYOUT, **options)


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="lazy"):
        convert(nn.Sequential(nn.LazyLinear(3)), LAYOUT)


# Layout.


def test_columns_values_and_noise() -> None:
    layout = Layout.of(SPACE, ["p", "q"], per_batch=["p"])
    values = {"p": torch.tensor(0.3), "q": torch.tensor([0.1, 0.5])}
    point = layout.coordinates(values)
    assert point.shape == (3,)
    back = layout.values(point)
    assert torch.allclose(back["p"], values["p"])
    assert torch.allclose(back["q"], values["q"])
    noise = layout.noise(6, torch.Generator().manual_seed(0), point)
    assert bool((noise[:, 0] == noise[0, 0]).all())
    assert len(set(noise[:, 1].tolist())) == 6
    many = layout.values(point + noise)
    assert many["p"].shape == ()
    assert many["q"].shape == (6, 2)
    for b in range(6):
        assert torch.allclose(many["q"][b], layout.values(point + noise[b])["q"])


def test_integers_are_rounded_and_reach_both_bounds() -> None:
    space = Space(holes=Grad(1.0, low=0.0, high=4.0))
    layout = Layout.of(space, ["holes"], integers=["holes"])
    z = torch.linspace(-9, 9, 400)[:, None].requires_grad_()
    values = layout.values(z)["holes"]
    assert set(values.tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    values.sum().backward()
    assert z.grad is not None
    assert not z.grad.any()


def test_layouts_that_are_refused() -> None:
    with pytest.raises(ValueError, match="owns none"):
        Layout.of(SPACE, [])
    with pytest.raises(ValueError, match="per_batch: 'x' is not owned by the gradient"):
        Layout.of(SPACE, ["p"], per_batch=["x"])
    with pytest.raises(TypeError, match="integers must be a collection"):
        Layout.of(SPACE, ["p"], integers="p")
    knots = Space(p=Grad(0.1, low=0.0, high=0.9, schedule=3))
    with pytest.raises(ValueError, match="p has a schedule of 3 knots"):
        Layout.of(knots, ["p"])
    many = Space(w=Grad(0.1, low=0.0, shape=(300,)))
    with pytest.raises(ValueError, match="at most 256 hyperparameters, but got 300"):
        Layout.of(many, ["w"])


class Words(nn.Module):
    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(5, 4), layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.rnn(self.embed(x))[0].mean(1))
        return out


@pytest.mark.parametrize(
    ("layer", "width", "linearize"),
    [
        (lambda: nn.LSTM(4, 6, 2, batch_first=True), 6, True),
        (lambda: nn.GRU(4, 6, batch_first=True), 6, True),
        (lambda: nn.GRU(4, 6, batch_first=True, bidirectional=True), 12, False),
        (lambda: nn.RNN(4, 6, batch_first=True), 6, False),
    ],
    ids=["LSTM", "GRU", "bidirectional", "RNN"],
)
def test_a_recurrent_layer_may_stay_plain_and_trains(
    layer: Any, width: int, linearize: bool
) -> None:
    torch.manual_seed(0)
    net = Words(layer(), width).double()
    found = convert(net, LAYOUT, plain=["rnn"])
    assert not any(name.startswith("rnn") for name in found.response_shapes())
    x, y = torch.randint(0, 5, (8, 7)), torch.randint(0, 3, (8,))
    assert torch.allclose(found.module(x), net(x), atol=1e-14)
    subject = ModuleInner(
        net, SPACE.fix(full=0.5, free=0.0, q=[0.1, 0.1]), plain=["rnn"],
        predict=lambda m, v, b: m(b["x"]),
        loss=lambda out, v, b: F.cross_entropy(out / (1 - v["p"][:, None]), b["y"]),
        outer_loss=lambda out, b: F.cross_entropy(out, b["y"], reduction="none"),
        train={"x": x, "y": y}, val={"x": x.flip(1), "y": y.clone()}, optimizer=SGD(lr=0.1),
    )  # fmt: skip
    before = subject.params
    # One step of SGD on the plain network is the same.
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    F.cross_entropy(net(x) / 0.9, y).backward()
    plain.step()
    subject.step()
    for name, value in net.named_parameters():
        assert torch.allclose(subject.params[name], value, atol=1e-12), name
        assert not torch.equal(subject.params[name], before[name])
    found_run = tune(subject, SelfTuning(train_steps=2, linearize=linearize), 4)
    assert found_run.test is None
    if linearize:  # tangents of the embedding pass through the plain layer
        t, shift = 1e-5, torch.randn(8, LAYOUT.size, dtype=torch.float64)
        for name in found.response_shapes():
            torch.nn.init.normal_(found.module.get_parameter(name))
        ends = []
        for sign in (1, -1):
            with found.perturbation.active(t * sign * shift, {}):
                ends.append(found.module(x).detach())
        with forward_ad.dual_level(), found.perturbation.active(shift, {}, linearized=True):
            tangent = forward_ad.unpack_dual(found.module(x)).tangent
        assert torch.allclose(tangent, (ends[0] - ends[1]) / (2 * t), atol=1e-8)
