"""Unconstrained coordinates: closed forms, round trips, derivatives, saturation; schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.special import expit
from torch import Tensor

from bilevel import Float, Grad, Space
from bilevel.coordinates import bijection, constrain, coordinate, coordinate_shape, interpolate
from tests.bilevel.strategies import grads

CASES = {
    "interval": Grad(0.3, -1.0, 2.0),
    "momentum": Grad(0.9, 0.0, 1.0),
    "low": Grad(1.5, low=1.0),
    "high": Grad(-3.0, high=-2.0),
    "free": Grad(0.7),
    "log interval": Grad(1e-2, 1e-6, 1e2, "log"),
    "log low": Grad(1e-2, low=1e-3, scale="log"),
    "log high": Grad(1e-2, high=5.0, scale="log"),
    "positive": Grad(1e-2, scale="log"),
    "simplex": Grad([0.2, 0.3, 0.5], scale="simplex", shape=(3,)),
    "tensor": Grad([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], 0.0, 1.0, shape=(2, 3)),
    "schedule": Grad(0.1, 1e-4, 1.0, "log", schedule=4),
    "simplex schedule": Grad([[0.1, 0.9]] * 2, scale="simplex", shape=(2, 2), schedule=3),
}
elementwise = pytest.mark.parametrize(
    "domain", [pytest.param(d, id=name) for name, d in CASES.items() if d.scale != "simplex"]
)
every = pytest.mark.parametrize("domain", CASES.values(), ids=CASES.keys())


def value_of(domain: Grad, dtype: torch.dtype = torch.float64) -> Tensor:
    return domain.check("init", domain.init).to(dtype)


def some_z(domain: Grad, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = coordinate_shape(domain)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("low", "high", "scale", "formula"),
    [
        (-1.0, 2.0, "linear", lambda z: -1 + 3 * expit(z)),
        (1.0, None, "linear", lambda z: 1 + np.log1p(np.exp(z))),
        (None, -2.0, "linear", lambda z: -2 - np.log1p(np.exp(-z))),
        (None, None, "linear", lambda z: z),
        (1e-6, 1e2, "log", lambda z: np.exp(np.log(1e-6) + np.log(1e8) * expit(z))),
        (1e-3, None, "log", lambda z: 1e-3 * (1 + np.exp(z))),
        (None, 5.0, "log", lambda z: 5 / (1 + np.exp(-z))),
        (None, None, "log", np.exp),
    ],
)
def test_closed_forms(low: float, high: float, scale: str, formula: object) -> None:
    z = np.linspace(-6, 6, 49)
    got = bijection(low, high, scale)(torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(got, formula(z), rtol=1e-13)  # type: ignore[operator]


def test_simplex_is_uniform_at_zero_and_sums_to_one() -> None:
    domain = Grad([1 / 7] * 7, scale="simplex", shape=(7,))
    torch.testing.assert_close(
        constrain(domain, torch.zeros(6, dtype=torch.float64)),
        torch.full((7,), 1 / 7, dtype=torch.float64),
    )
    total = constrain(domain, some_z(domain)).sum()
    assert abs(float(total) - 1) < 1e-14


@every
def test_value_round_trip(domain: Grad) -> None:
    value = value_of(domain)
    torch.testing.assert_close(
        constrain(domain, coordinate(domain, value)), value, rtol=1e-12, atol=0
    )


@every
def test_coordinate_round_trip(domain: Grad) -> None:
    z = some_z(domain)
    torch.testing.assert_close(coordinate(domain, constrain(domain, z)), z, rtol=0, atol=1e-11)


@given(grads())
@settings(deadline=None, max_examples=100)
def test_round_trip_of_any_domain(domain: Grad) -> None:
    value = value_of(domain)
    back = constrain(domain, coordinate(domain, value))
    # Values near zero inside a wide linear range carry the rounding of the range.
    span = max(abs(domain.low or 0.0), abs(domain.high or 0.0)) if domain.scale == "linear" else 0.0
    torch.testing.assert_close(back, value, rtol=1e-12, atol=1e-14 * span)
    domain.check("value", back, inside=True)


@pytest.mark.parametrize("gap", [1e-9, 1.0, 19.9, 20.1, 25.0, 300.0])
def test_softplus_has_no_jump(gap: float) -> None:
    domain = Grad(gap, low=0.0)
    assert float(constrain(domain, coordinate(domain, value_of(domain)))) == pytest.approx(
        gap, rel=1e-14
    )


@every
def test_derivative_against_central_differences(domain: Grad) -> None:
    z = some_z(domain, scale=1.0).requires_grad_()
    weights = torch.randn(
        domain.value_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    def outer(z: Tensor) -> Tensor:
        return (weights * constrain(domain, z).sin()).sum()

    (grad,) = torch.autograd.grad(outer(z), z)
    step = 1e-5
    for i in range(z.numel()):
        e = torch.zeros(z.numel(), dtype=torch.float64)
        e[i] = step
        shift = e.reshape(z.shape)
        difference = (outer(z.detach() + shift) - outer(z.detach() - shift)) / (2 * step)
        torch.testing.assert_close(grad.flatten()[i], difference.detach(), rtol=1e-6, atol=1e-10)


@every
def test_chain_rule_through_value(domain: Grad) -> None:
    """dF/dz is the vector-Jacobian product of T at dF/dv, as an outer optimizer uses it."""
    z = some_z(domain).requires_grad_()
    value = constrain(domain, z)
    cotangent = torch.randn_like(value)
    (product,) = torch.autograd.grad(value, z, cotangent)
    jacobian = torch.autograd.functional.jacobian(lambda z: constrain(domain, z), z.detach())
    dense = cotangent.flatten() @ jacobian.reshape(value.numel(), z.numel())
    torch.testing.assert_close(product.flatten(), dense)


@every
def test_second_derivative(domain: Grad) -> None:
    torch.autograd.gradgradcheck(
        lambda z: constrain(domain, z), some_z(domain, scale=1.0).requires_grad_()
    )


@elementwise
def test_coordinates_increase(domain: Grad) -> None:
    z = torch.linspace(-8, 8, 200, dtype=torch.float64)
    values = bijection(domain.low, domain.high, domain.scale)(z)
    assert bool((values.diff() > 0).all())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [15.0, 20.0, 90.0, 750.0, 1e30])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_far_coordinates_stay_inside(
    domain: Grad, dtype: torch.dtype, size: float, sign: float
) -> None:
    z = torch.full(coordinate_shape(domain), sign * size, dtype=dtype).requires_grad_()
    value = constrain(domain, z)
    domain.check("value", value, inside=True)
    assert bool(torch.isfinite(coordinate(domain, value)).all())
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert bool(torch.isfinite(grad).all())


@elementwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbors_of_the_bounds_have_finite_coordinates(domain: Grad, dtype: torch.dtype) -> None:
    for limit in domain.limits(dtype):
        if limit is not None:
            value = torch.full(domain.value_shape, limit, dtype=dtype)
            z = coordinate(domain, value)
            assert bool(torch.isfinite(z).all())
            domain.check("value", constrain(domain, z), inside=True)


def test_a_saturated_coordinate_can_come_back() -> None:
    domain = Grad(1.5, 1.0, 2.0)
    z = torch.tensor(-20.0, requires_grad=True)  # float32: 1 + σ(-20) rounds to 1
    value = constrain(domain, z)
    assert 1.0 < value.item() <= 1.0 + 1e-6
    (grad,) = torch.autograd.grad(value, z)
    assert float(grad) == pytest.approx(math.exp(-20), rel=1e-5)


def test_space_coordinates_follow_owner_dtype_and_shape() -> None:
    space = Space(
        lr=Grad(0.1, 1e-4, 1.0, "log", schedule=5),
        mix=Grad([0.5, 0.5], scale="simplex", shape=(2,)),
        beta=Float(0.0, 0.99, default=0.9),
        wd=Grad(1e-3, 1e-6, 1.0, "log"),
    ).own(beta="grad", wd="sampler")
    z = space.coordinates(space.defaults(dtype=torch.float64))
    assert {name: tuple(t.shape) for name, t in z.items()} == {"lr": (5,), "mix": (1,), "beta": ()}
    assert {t.dtype for t in z.values()} == {torch.float64}
    assert float(z["beta"]) == pytest.approx(math.log(0.9 / 0.09), rel=1e-12)
    values = space.validate({**space.defaults(), **space.constrain(z)})
    assert list(values) == list(space)


def test_rounding_to_float32_does_not_reach_a_bound() -> None:
    space = Space(p=Grad(0.1 - 1e-12, 0.0, 0.1))
    value = space.defaults(dtype=torch.float32)["p"]
    assert float(value) < float(np.float32(0.1))
    assert math.isfinite(float(space.coordinates({"p": value})["p"]))
    exact = torch.tensor(0.1 - 1e-12, dtype=torch.float64, requires_grad=True)
    rounded = space.validate({"p": exact}, dtype=torch.float32)["p"]
    assert rounded.item() < float(np.float32(0.1))
    assert torch.autograd.grad(rounded, exact)[0].item() == 1.0


def test_limits_are_the_neighbors_of_the_bounds() -> None:
    low, high = Grad(1.5, 1.0, 2.0).limits(torch.float64)
    assert (low, high) == (math.nextafter(1.0, 2.0), math.nextafter(2.0, 1.0))
    # Not a subnormal number: hardware that flushes those to zero would give log(0).
    assert Grad(0.5, 0.0, 1.0).limits(torch.float32)[0] == torch.finfo(torch.float32).tiny
    with pytest.raises(ValueError, match=r"the bound 1e\+39 does not fit in torch.float32"):
        Grad(0.5, 0.0, 1e39).limits(torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device() -> None:
    space = Space(wd=Grad(1e-3, 1e-6, 1.0, "log", shape=(3,)), p=Grad(0.5, 0.0, 1.0))
    z = space.coordinates(space.defaults(), device="cuda")
    assert {t.device.type for t in space.constrain(z).values()} == {"cuda"}


def test_bad_coordinates() -> None:
    space = Space(p=Grad(0.5, 0.0, 1.0, shape=(2,)), n=Float(0.0, 1.0))
    with pytest.raises(ValueError, match=r"z\['p'\] must have shape \(2,\), but got \(3,\)"):
        space.constrain({"p": torch.zeros(3)})
    with pytest.raises(TypeError, match=r"z\['p'\] must be a float32 or float64 tensor.*int64"):
        space.constrain({"p": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match="'n' is not owned by the gradient; known: p"):
        space.constrain({"n": torch.zeros(())})
    with pytest.raises(ValueError, match="p is missing"):
        space.coordinates({"n": 0.5})
    with pytest.raises(ValueError, match=r"p\[1\] must be in \(0.0, 1.0\), but got 1.0"):
        space.coordinates({"p": torch.tensor([0.5, 1.0])})
    with pytest.raises(TypeError, match=r"dtype must be .*bfloat16"):
        space.coordinates({"p": 0.5}, dtype=torch.bfloat16)
    narrow = Space(p=Grad(1 + 5e-9, 1.0, 1 + 1e-8))
    with pytest.raises(ValueError, match=r"no torch.float32 number lies strictly between"):
        narrow.defaults(dtype=torch.float32)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_schedule_against_numpy(scale: str) -> None:
    domain = Grad(0.1, 1e-4, 1.0, scale, shape=(2,), schedule=4)  # type: ignore[arg-type]
    knots = torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.01
    forth, back = (np.log, np.exp) if scale == "log" else (np.asarray, np.asarray)
    for t in [0.0, 0.1, 1 / 3, 0.5, 0.77, 1.0]:
        want = [
            back(np.interp(t, np.linspace(0, 1, 4), forth(knots[:, j].numpy()))) for j in range(2)
        ]
        np.testing.assert_allclose(interpolate(domain, knots, t).numpy(), want, rtol=1e-13)


def test_schedule_is_differentiable_in_knots_and_progress() -> None:
    domain = Grad(0.1, scale="log", schedule=3)
    knots = torch.tensor([0.1, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    progress = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda k, t: interpolate(domain, k, t), (knots, progress))


def test_schedule_of_a_simplex_stays_on_it() -> None:
    domain = CASES["simplex schedule"]
    knots = constrain(domain, some_z(domain))
    for t in torch.linspace(0, 1, 11).tolist():
        Grad([[0.5, 0.5]] * 2, scale="simplex", shape=(2, 2)).check(
            "value", interpolate(domain, knots, t)
        )


def test_space_at_reads_schedules_only() -> None:
    space = Space(lr=Grad(0.1, scale="log", schedule=2), wd=Grad(0.1, shape=(2,)), n=Float(0, 1))
    values = space.validate({"lr": [0.01, 1.0]}, dtype=torch.float64)
    now = space.at(values, 0.5)
    assert float(now["lr"]) == pytest.approx(0.1, rel=1e-14)
    assert now["wd"] is values["wd"]
    assert now["n"] == values["n"]
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"progress must be in \[0, 1\]"):
            space.at(values, bad)
    with pytest.raises(ValueError, match="has no schedule"):
        interpolate(CASES["free"], torch.zeros(()), 0.5)
