"""Update rules: the numbers of torch.optim, and adjoints against autograd."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import SGD, Adagrad, Adam, AdamW, Hyper, Lion, Optimizer, RMSprop, from_torch
from hypergrad.optimizers import as_optimizer
from hypergrad.optimizers.base import vectors
from hypergrad.optimizers.convert import _SWITCHES, RULES
from hypergrad.optimizers.values import constants
from hypergrad.tree import trainable_leaves

SHAPES = ((3, 5), (7,), (), (33, 31))


def _options(**choices: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Every combination; the first choice of each is the default and left out."""
    defaults = {k: v[0] for k, v in choices.items()}
    return [
        {k: v for k, v in zip(choices, c, strict=True) if v != defaults[k]}
        for c in itertools.product(*choices.values())
    ]


BETAS = ((0.9, 0.999), (0.0, 0.5))
OPTIONS: dict[type[Optimizer], list[dict[str, Any]]] = {
    SGD: [
        o
        for o in _options(
            momentum=(0.0, 0.9),
            dampening=(0.0, 0.3),
            weight_decay=(0.0, 0.1),
            nesterov=(False, True),
            maximize=(False, True),
        )
        if ("momentum" in o or not {"dampening", "nesterov"} & set(o))
        and not {"dampening", "nesterov"} <= set(o)
    ],
    Adam: _options(
        betas=BETAS,
        eps=(1e-8, 0.1),
        weight_decay=(0.0, 0.1),
        amsgrad=(False, True),
        maximize=(False, True),
    ),
    AdamW: _options(
        betas=BETAS,
        eps=(1e-8, 0.1),
        weight_decay=(0.01, 0.0),
        amsgrad=(False, True),
        maximize=(False, True),
    ),
    RMSprop: _options(
        alpha=(0.99, 0.5),
        eps=(1e-8, 0.1),
        weight_decay=(0.0, 0.1),
        momentum=(0.0, 0.9),
        centered=(False, True),
        maximize=(False, True),
    ),
    Adagrad: _options(
        lr_decay=(0.0, 0.1),
        weight_decay=(0.0, 0.1),
        initial_accumulator_value=(0.0, 0.3),
        eps=(1e-10, 0.1),
        maximize=(False, True),
    ),
}
THEIRS: dict[type[Optimizer], type[torch.optim.Optimizer]] = {v: k for k, v in RULES.items()}


def _params(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in SHAPES]


def _run_both(
    theirs: torch.optim.Optimizer, params: list[Tensor], ours: Optimizer, tolerance: float = 0.0
) -> None:
    """Take 25 steps side by side and compare, bit by bit without a tolerance."""
    leaves = trainable_leaves(params)
    flat = torch.cat([p.detach().reshape(-1).clone() for p in params])
    values, state = constants(ours.resolve({}, leaves)), ours.init(flat)
    generator = torch.Generator().manual_seed(1)
    for _ in range(25):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if p.dim() == 1:
                p.grad[2] = 0.0
        grad = torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None])
        theirs.step()
        flat, state = ours.update(flat, grad, state, values)
        expected = torch.cat([p.detach().reshape(-1) for p in params])
        torch.testing.assert_close(flat, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ours", OPTIONS)
def test_numbers_are_those_of_torch_optim(ours: Any, dtype: Any) -> None:
    """Every combination of options, by the class and by the instance."""
    for options in OPTIONS[ours]:
        params = _params(dtype)
        theirs: Any = THEIRS[ours](params, lr=0.05, foreach=False, **options)  # type: ignore[call-arg]
        rule = ours(lr=0.05, **options)
        assert from_torch(type(theirs), lr=0.05, **options) == rule
        assert from_torch(theirs, params) == rule
        _run_both(theirs, params, rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.03, "weight_decay": 0.07}),
        (torch.optim.SGD, {"momentum": 0.0, "dampening": 0.5}, {"momentum": 0.9}),
        (torch.optim.Adam, {"lr": 0.1}, {"eps": 1e-3, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.0}, {"lr": 0.03, "weight_decay": 0.3}),
        (torch.optim.RMSprop, {"alpha": 0.9, "weight_decay": 0.1}, {"eps": 1e-3, "lr": 0.01}),
        (torch.optim.RMSprop, {"momentum": 0.9}, {"momentum": 0.5, "weight_decay": 0.1}),
        (torch.optim.Adagrad, {"lr_decay": 0.1}, {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.1}),
        (torch.optim.Adagrad, {"initial_accumulator_value": 0.3}, {}),
    ],
)
def test_parameter_groups(kind: Any, first: Any, second: Any, dtype: torch.dtype) -> None:
    params = _params(dtype)
    groups = [{"params": params[1::2], **first}, {"params": params[::2], **second}]
    theirs = kind(groups, lr=0.05, foreach=False)
    _run_both(theirs, params, from_torch(theirs, params))


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.Adam, {"betas": (0.7, 0.9)}), (torch.optim.RMSprop, {"momentum": 0.9})],
)
def test_parameter_groups_that_agree_to_rounding(kind: Any, options: Any) -> None:
    params = _params(torch.float64)
    groups = [{"params": params[1::2]}, {"params": params[::2], **options}]
    theirs = kind(groups, lr=0.05, foreach=False)
    _run_both(theirs, params, from_torch(theirs, params), tolerance=1e-14)


ADJOINTS = [
    SGD(0.1),
    SGD(0.1, 0.9),
    SGD(0.1, 0.9, 0.3, 0.02),
    SGD(0.1, 0.9, 0.0, 0.02, nesterov=True),
    SGD(0.1, 0.9, 0.2, 0.02, maximize=True),
    Adam(0.1, weight_decay=0.01, eps=1e-3),
    Adam(0.1, amsgrad=True),
    Adam(0.1, maximize=True, weight_decay=0.1),
    AdamW(0.1),
    AdamW(0.1, amsgrad=True, maximize=True),
    RMSprop(0.1, 0.9, 1e-3, 0.1),
    RMSprop(0.1, 0.8, momentum=0.9),
    RMSprop(0.1, 0.9, centered=True, maximize=True),
    RMSprop(0.1, 0.7, 1e-3, 0.1, 0.9, centered=True),
    Adagrad(0.1, 0.1, 0.1, 0.3, 1e-3),
    Adagrad(0.1, maximize=True),
    Lion(0.1, weight_decay=0.1),
    Lion(0.1, (0.5, 0.8), maximize=True),
]


@pytest.mark.parametrize("step", [0, 1, 4])
@pytest.mark.parametrize("rule", ADJOINTS, ids=str)
def test_adjoint_is_the_derivative_of_update(rule: Optimizer, step: int) -> None:
    """Against autograd, with every pair of values per element and the others numbers."""
    d = 7
    generator = torch.Generator().manual_seed(step)

    def draw() -> Tensor:
        return torch.randn(d, generator=generator, dtype=torch.float64)

    names = list(rule.hyperparameters)
    for vector in [(), *itertools.combinations(names, 2), tuple(names)]:
        values: dict[str, float | Tensor] = {}
        for k, v in rule.hyperparameters.items():
            values[k] = v * (0.8 + 0.1 * torch.sigmoid(draw())) if k in vector else float(v)
        flat, grad, state = draw(), draw(), rule.init(draw())
        for _ in range(step):
            flat, state = rule.update(flat, draw(), state, values)
        _, after = rule.update(flat, grad, state, values)
        state_bar = {k: draw() for k in vectors(after)}
        arguments = (flat, grad, state, values, draw(), state_bar, names)
        ours, reference = rule.adjoint(*arguments), Optimizer.adjoint(rule, *arguments)
        for a, b in zip(ours[:2], reference[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        for a, b in zip(ours[2:], reference[2:], strict=True):
            for key, expected in b.items():
                found = a.get(key, torch.zeros_like(expected)).to(expected)
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rule", ADJOINTS, ids=str)
def test_numbers_and_tensors_give_the_same_bits(rule: Optimizer) -> None:
    flat, grad = torch.randn(9), torch.randn(9)
    numbers = constants(rule.resolve({}, trainable_leaves([flat.clone().requires_grad_()])))
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
    state = other = rule.init(flat)
    a = b = flat
    for _ in range(5):
        a, state = rule.update(a, grad, state, numbers)
        b, other = rule.update(b, grad, other, tensors)
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "rule",
    [
        Adam(0.1),
        Adam(0.1, amsgrad=True),
        AdamW(0.1),
        RMSprop(0.1),
        RMSprop(0.1, centered=True, momentum=0.9),
        Adagrad(0.1),
    ],
    ids=str,
)
def test_entries_without_gradient_are_finite(rule: Optimizer) -> None:
    """√v at v = 0: both adjoints and the second derivative are finite, and zero there."""
    flat = torch.randn(4, dtype=torch.float64)
    grad = torch.tensor([1.0, 0.0, -2.0, 0.0], dtype=torch.float64, requires_grad=True)
    values = constants(rule.resolve({}, trainable_leaves([flat.clone().requires_grad_()])))
    out, _ = rule.update(flat, grad, rule.init(flat), values)
    (first,) = torch.autograd.grad(out.sum(), grad, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), grad)
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()
    _, by_hand, _, _ = rule.adjoint(
        flat, grad.detach(), rule.init(flat), values, torch.ones_like(flat), {}, []
    )
    torch.testing.assert_close(by_hand, first.detach())


def test_nesterov_needs_momentum() -> None:
    for options in ({}, {"momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(ValueError, match="nesterov=True needs a momentum and zero dampening"):
            SGD(0.1, nesterov=True, **options)
    SGD(0.1, Hyper("momentum"), nesterov=True)


def test_from_torch_refuses_what_it_cannot_do() -> None:
    w, other = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    supported = r"torch\.optim\.SGD, .*Adam, .*AdamW, .*RMSprop, torch\.optim\.Adagrad"
    for unsupported in (torch.optim.Rprop([w]), torch.optim.Rprop):
        with pytest.raises(TypeError, match=f"one of {supported}, but got Rprop"):
            from_torch(unsupported, {"w": w} if unsupported is not torch.optim.Rprop else None)
    with pytest.raises(TypeError, match=f"one of {supported}, but got Tilted"):
        from_torch(type("Tilted", (torch.optim.SGD,), {}), lr=0.1)
    with pytest.raises(ValueError, match=r"params\['v'\] requires grad but is in no parameter"):
        from_torch(torch.optim.SGD([w]), {"w": w, "v": other})
    mixed = torch.optim.SGD([{"params": [w]}, {"params": [other], "maximize": True}], lr=0.1)
    with pytest.raises(ValueError, match="maximize must be the same in all parameter groups"):
        from_torch(mixed, {"w": w, "v": other})
    lr = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(ValueError, match=r"requires grad; put it in hparams"):
        from_torch(torch.optim.SGD([w], lr=lr, differentiable=True), {"w": w})
    with pytest.raises(TypeError, match="needs params with an instance"):
        from_torch(torch.optim.SGD([w]))
    with pytest.raises(TypeError, match="options with a class; this SGD has its own, but got lr"):
        from_torch(torch.optim.SGD([w]), {"w": w}, lr=0.1)


def test_from_torch_takes_a_class_with_options() -> None:
    mu, decay = Hyper("mu"), torch.tensor(0.1)
    rule = from_torch(torch.optim.SGD, lr=0.1, momentum=mu, weight_decay=decay, nesterov=True)
    assert rule == SGD(0.1, mu, 0.0, decay, nesterov=True)
    betas = (Hyper("beta"), 0.99)
    assert from_torch(torch.optim.Adam, betas=betas, fused=True) == Adam(betas=betas)
    with pytest.raises(TypeError, match=r"SGD has no option 'alpha' here; it has \['lr', 'mom"):
        from_torch(torch.optim.SGD, lr=0.1, alpha=0.9)
    with pytest.raises(TypeError, match=r"second positional argument of type float"):
        from_torch(torch.optim.SGD, 0.1)
    with pytest.raises(TypeError, match="Adam amsgrad must be True or False, got 1"):
        from_torch(torch.optim.Adam, amsgrad=1)
    with pytest.raises(ValueError, match="Adam betas must be a pair"):
        from_torch(torch.optim.Adam, betas=0.9)
    with pytest.raises(TypeError, match=r"Convert it with .*from_torch\(torch\.optim\.SGD, lr="):
        as_optimizer(torch.optim.SGD)
    with pytest.raises(TypeError, match=r"got the class Rprop\.$"):
        as_optimizer(torch.optim.Rprop)


@pytest.mark.parametrize("theirs", RULES)
def test_from_torch_has_the_options_and_defaults_of_the_class(theirs: Any) -> None:
    rule = from_torch(theirs)
    ours = {f.name: getattr(rule, f.name) for f in fields(rule)}
    parameters = inspect.signature(theirs).parameters
    expected = {k: p.default for k, p in parameters.items() if k not in _SWITCHES}
    del expected["params"]
    expected.pop("decoupled_weight_decay", None)
    assert ours == expected
    w = torch.zeros(2, requires_grad=True)
    assert from_torch(theirs([w]), {"w": w}) == rule


def test_adam_with_decoupled_decay_is_adamw() -> None:
    w = torch.zeros(2, requires_grad=True)
    options: dict[str, Any] = {"decoupled_weight_decay": True}
    for rule in (
        from_torch(torch.optim.Adam, **options),
        from_torch(torch.optim.Adam([w], **options), {"w": w}),
    ):
        assert rule == AdamW(weight_decay=0.0)
