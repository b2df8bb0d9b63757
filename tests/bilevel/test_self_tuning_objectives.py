"""Objectives against closed forms: ridge regression, quadratics, sigmoid gating, rank."""

from __future__ import annotations

import math
import random
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bilevel import Grad, ModuleInner, ProblemInner, SelfTuning, Space, tune
from bilevel.self_tuning import Layout, convert
from bilevel.self_tuning.leaves import LeafResponse
from bilevel.self_tuning.response import response_model
from bilevel.self_tuning.scale import entropy, softplus
from bilevel.self_tuning.weights import Weights
from hypergrad import SGD, Problem

F64 = torch.float64
N_TRAIN = 60


@lru_cache
def diabetes() -> tuple[Tensor, Tensor]:
    """60 standardized rows of the diabetes data, and their standardized targets."""
    x, y = load_diabetes(return_X_y=True)
    x, y = x[:N_TRAIN], y[:N_TRAIN]
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return torch.from_numpy(x), torch.from_numpy(y)


def ridge(penalty: float) -> Tensor:
    """w* = (XᵀX + e^λ I)⁻¹ Xᵀt."""
    x, t = diabetes()
    return torch.linalg.solve(x.T @ x + math.exp(penalty) * torch.eye(10, dtype=F64), x.T @ t)


def test_gating_hidden_units_is_ridge_regression() -> None:
    """Check 8.1: rotate, gate by sigmoid(2 log d_i - λ), read out with fixed weights."""
    x, t = diabetes()
    u, d, vt = torch.linalg.svd(x, full_matrices=False)
    readout = (u.T @ t) / d
    for penalty in np.linspace(-6, 10, 33):
        gates = torch.sigmoid(2 * d.log() - penalty)
        assert torch.allclose(vt.T @ (gates * readout), ridge(penalty), atol=1e-10)


def test_a_response_layer_holds_the_tangent_of_the_gates() -> None:
    """Row gates of a hidden layer give the best response to first order: the error falls as s²."""
    x, t = diabetes()
    u, d, vt = torch.linalg.svd(x, full_matrices=False)
    readout, penalty = (u.T @ t) / d, 1.5
    gates = torch.sigmoid(2 * d.log() - penalty)
    layout = Layout.of(Space(penalty=Grad(penalty)), ["penalty"])
    found = convert(nn.Linear(10, 10, bias=False).double(), layout)
    layer = found.layers[""]
    with torch.no_grad():
        layer.pair("weight")[0].copy_(gates[:, None] * vt)
        layer._parameters["response_weight"].copy_(vt)  # type: ignore[union-attr]
        layer._parameters["gate_weight"].copy_((-gates * (1 - gates))[:, None])  # type: ignore[union-attr]
    steps = torch.tensor([0.0, 0.02, -0.02, 0.01, -0.01], dtype=F64)
    errors = []
    for step in steps:
        with torch.no_grad(), found.perturbation.active(step.expand(len(x), 1), {}):
            errors.append(
                float((found.module(x) @ readout - x @ ridge(penalty + float(step))).norm())
            )
    assert errors[0] < 1e-10
    assert errors[1] / errors[3] == pytest.approx(4.0, rel=0.05)
    assert errors[2] / errors[4] == pytest.approx(4.0, rel=0.05)


# Fixed points.  The response of a vector is unstructured: θ = gate · response.


def _response(model: LeafResponse, theta: Tensor) -> dict[str, Tensor]:
    (name,) = [k.removeprefix("gate_") for k in model.initial("delta", torch.Generator())
               if k.startswith("gate_")]  # fmt: skip
    return {
        f"response_{name}": torch.ones(len(theta), dtype=F64, requires_grad=True),
        f"gate_{name}": theta.clone().requires_grad_(),
    }


def _problem(penalty: float) -> ProblemInner:
    """½‖Xw - t‖² + ½ e^λ ‖w‖²."""

    def inner(params: Any, hparams: Any, batch: Any) -> Tensor:
        x, t = batch
        w = params["w"]
        fit = (x @ w - t).square().sum()
        return 0.5 * (fit + hparams["penalty"].exp() * w.square().sum())

    return ProblemInner(
        Problem(inner, lambda p, h, b: (b[0] @ p["w"] - b[1]).square().sum()),
        {"w": torch.zeros(10, dtype=F64, requires_grad=True)},
        optimizer=SGD(lr=0.1),
        space=Space(penalty=Grad(penalty)),
        inner_batch=diabetes(),
        outer_batch=diabetes(),
    )


def _expected_gradients(
    inner: ProblemInner,
    w: Tensor,
    theta: Tensor,
    penalty: float,
    sigma: float,
    centered: bool,
    nodes_count: int = 40,
) -> dict[str, Tensor]:
    """E_ε of the gradients of the training loss at λ + σε, by Gauss–Hermite quadrature."""
    model = LeafResponse(inner)
    nodes, masses = np.polynomial.hermite_e.hermegauss(nodes_count)
    w = w.clone().requires_grad_()
    response = _response(model, theta[:, None])
    names = ["w", *response]
    total = {name: torch.zeros((), dtype=F64) for name in names}
    for node, mass in zip(nodes, masses / masses.sum(), strict=True):
        point = torch.tensor([penalty + sigma * node], dtype=F64)
        shift = point - penalty if centered else point
        loss = model.training_loss({"w": w}, response, shift, point, diabetes())
        for name, grad in zip(
            names, torch.autograd.grad(loss, [w, *response.values()]), strict=True
        ):
            total[name] = total[name] + mass * grad
    return total


@pytest.mark.parametrize("penalty", [-1.0, 3.0])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0])
def test_fixed_points_of_ridge_regression(penalty: float, sigma: float) -> None:
    """Check 8.3, in closed form, for STN and for Δ-STN.

    STN: [[S + LmI, Lmσ²I], [Lmσ²I, σ²S + Lm(σ²+σ⁴)I]] [w; θ] = [Xᵀt; 0];
    Δ-STN: w = (S + LI)⁻¹Xᵀt and θ = -Lm (S + Lm(1+σ²)I)⁻¹ w,  L = e^λ, m = e^{σ²/2}.
    """
    x, t = diabetes()
    S, eye = x.T @ x, torch.eye(10, dtype=F64)
    L, m, v = math.exp(penalty), math.exp(sigma**2 / 2), sigma**2
    rows = [
        torch.cat([S + L * m * eye, L * m * v * eye], 1),
        torch.cat([L * m * v * eye, v * S + L * m * (v + v * v) * eye], 1),
    ]
    solved = torch.linalg.solve(torch.cat(rows), torch.cat([x.T @ t, torch.zeros(10, dtype=F64)]))
    value, slope = solved.split(10)
    inner = _problem(penalty)
    scale = float((x.T @ t).norm())
    # The STN weights w + θλ have the value `value` at λ.
    found = _expected_gradients(inner, value - slope * penalty, slope, penalty, sigma, False)
    assert all(float(g.norm()) < 1e-11 * scale for g in found.values()), found
    general = ridge(penalty)
    theta = -L * m * torch.linalg.solve(S + L * m * (1 + v) * eye, general)
    found = _expected_gradients(inner, general, theta, penalty, sigma, True)
    assert all(float(found[n].norm()) < 1e-11 * scale for n in found if n != "w"), found
    # Perturbed training does not leave w* alone, which is why Δ-STN trains it apart.
    assert float(found["w"].norm()) > 1e-6 * scale
    truth = -L * torch.linalg.solve(S + L * eye, general)
    if sigma == 0.05:
        assert torch.allclose(theta, truth, rtol=5e-3, atol=1e-5)


def _flow(
    inner: ProblemInner, at: float, sigma: float, mode: str, nodes: int = 40
) -> tuple[Tensor, Tensor]:
    """H, b of the expected gradient H [w; θ] - b that training follows; it is affine.

    In Δ-STN w follows the loss without perturbation.
    """
    d = len(inner.params["w"])

    def gradient(v: Tensor) -> Tensor:
        w, theta = v[:d], v[d:]
        found = _expected_gradients(inner, w, theta, at, sigma, mode == "delta", nodes)
        if mode == "delta":
            plain = _expected_gradients(inner, w, 0 * theta, at, 0.0, True, 1)
            found["w"] = plain["w"]
        (gate,) = (g for name, g in found.items() if name.startswith("gate_"))
        return torch.cat([found["w"], gate[:, 0]])

    base = gradient(torch.zeros(2 * d, dtype=F64))
    columns = [gradient(e) - base for e in torch.eye(2 * d, dtype=F64)]
    return torch.stack(columns, 1), -base


@pytest.mark.parametrize(
    ("at", "sigma", "stn", "delta"),
    [(3.0, 1.0, 119.0, 1.0), (5.0, 1.0, 727.0, 1.0), (-6.0, 0.5, 5548.0, 4.0)],
)
def test_conditioning_of_joint_quadratics(
    at: float, sigma: float, stn: float, delta: float
) -> None:
    """Check 8.4: M ⊗ A with M = [[1, λ], [λ, λ² + σ²]] in STN, diag(1, σ²) in Δ-STN."""
    inner, A, _, _ = _quadratic(n=1)
    moments = {
        "stn": torch.tensor([[1.0, at], [at, at**2 + sigma**2]], dtype=F64),
        "delta": torch.tensor([[1.0, 0.0], [0.0, sigma**2]], dtype=F64),
    }
    for mode, expected in (("stn", stn), ("delta", delta)):
        hessian, _ = _flow(inner, at, sigma, mode, nodes=3)
        assert torch.allclose(hessian, torch.kron(moments[mode], A), atol=1e-10)
        assert float(torch.linalg.cond(moments[mode])) == pytest.approx(expected, rel=5e-3)


def test_delta_needs_fewer_steps_on_ridge_regression() -> None:
    """Check 8.4: gradient descent until value and slope are within 1 % of where they end."""
    penalty, count = 3.0, {}
    for mode in ("stn", "delta"):
        H, b = _flow(_problem(penalty), penalty, 0.5, mode, nodes=20)
        end = torch.linalg.solve(H, b)
        if mode == "stn":
            step = torch.full((20,), 1 / float(torch.linalg.eigvalsh(H)[-1]), dtype=F64)
        else:  # two optimizers
            largest = [
                float(torch.linalg.eigvalsh(block)[-1]) for block in (H[:10, :10], H[10:, 10:])
            ]
            step = 1 / torch.tensor(largest, dtype=F64).repeat_interleave(10)
        value = torch.eye(20, dtype=F64)[:10]
        if mode == "stn":
            value = torch.cat([value[:, :10], penalty * value[:, :10]], 1)
        slope = torch.eye(20, dtype=F64)[10:]
        v, steps, off = torch.zeros(20, dtype=F64), 0, 1.0
        while off > 0.01 and steps < 50_000:
            v, steps = v - step * (H @ v - b), steps + 1
            off = max(float((P @ (v - end)).norm() / (P @ end).norm()) for P in (value, slope))
        count[mode] = steps
    assert count["delta"] * 20 < count["stn"] < 50_000


def _quadratic(n: int) -> tuple[ProblemInner, Tensor, Tensor, Tensor]:
    """½wᵀAw + wᵀBλ + cᵀw."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=F64)).Q
    A = basis @ torch.linspace(1, 3, 6, dtype=F64).diag() @ basis.T
    B = torch.randn(6, n, generator=generator, dtype=F64)
    c = torch.randn(6, generator=generator, dtype=F64)

    def inner(params: Any, hparams: Any, batch: Any) -> Tensor:
        w, h = params["w"], hparams["h"]
        return 0.5 * w @ A @ w + w @ B @ h + c @ w

    problem = Problem(inner, lambda p, h, b: (p["w"] - 1).square().sum())
    subject = ProblemInner(
        problem,
        {"w": torch.zeros(6, dtype=F64, requires_grad=True)},
        optimizer=SGD(lr=0.03, momentum=0.5),
        space=Space(h=Grad(0.3, shape=(n,))),
    )
    return subject, A, B, c


@pytest.mark.parametrize("mode", ["stn", "delta"])
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_an_affine_response_is_exact_for_joint_quadratics(mode: Any, sigma: float) -> None:
    """Check 8.2, by training: ŵ(λ) = w*(λ) and ∂ŵ = -A⁻¹B for any σ, although ε is noise."""
    inner, A, B, c = _quadratic(n=2)
    algorithm = SelfTuning(
        mode=mode, lr=0.0, sigma=sigma, tune_sigma=False, train_steps=50,
        response_optimizer=SGD(lr=0.03, momentum=0.5),
    )  # fmt: skip
    found = tune(inner, algorithm, 500, seed=1)
    h = found.hparams["h"]
    best = -torch.linalg.solve(A, B @ h + c)
    assert torch.allclose(found.params["w"], best, atol=1e-4)
    weights = found.state["run"]["algorithm"]["weights"]
    model = response_model(inner)
    sizes = [torch.Size(s).numel() for s in weights["shapes"]]
    pieces = weights["response"].split(sizes)
    gate = pieces[1].view(6, 2) * pieces[0][:, None]
    assert torch.allclose(gate, -torch.linalg.solve(A, B), atol=2e-3)
    assert model.layout.size == 2


def test_the_rank_limit() -> None:
    """Check 8.6: the row response of one output to n penalties is (W_R)_i U_iᵀ, of rank one.

    Fitted to a full Jacobian, what is left over is exactly what the best rank-one matrix leaves.
    """
    torch.manual_seed(0)
    n, d = 4, 5
    layout = Layout.of(Space(h=Grad(0.1, shape=(n,))), ["h"])
    found = convert(nn.Linear(d, 2, bias=False).double(), layout)
    target = torch.randn(2, d, n, dtype=F64)
    response, gate = (
        found.module.get_parameter(f"{kind}_weight").requires_grad_()
        for kind in ("response", "gate")
    )
    nn.init.normal_(response)
    nn.init.normal_(gate)

    def jacobian() -> Tensor:
        """∂W/∂s, shape (2, d, n), by moving s along each axis."""
        layer = found.layers[""]
        base = layer.pair("weight")[0]
        columns = [layer.effective(e)["weight"] - base for e in torch.eye(n, dtype=F64)]
        return torch.stack(columns, -1)

    optimizer = torch.optim.LBFGS(
        [response, gate], max_iter=150, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (jacobian() - target).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    floors = [float(torch.linalg.svdvals(target[i])[1:].square().sum()) for i in range(2)]
    left = (jacobian() - target).square().sum((1, 2)).tolist()
    assert left == pytest.approx(floors, rel=1e-6)


# The losses of a module.


def _module_inner(**options: Any) -> ModuleInner:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    space = Space(p=Grad(0.2, low=0.0, high=0.9), smooth=Grad(0.1, low=0.0, high=0.5))
    g = torch.Generator().manual_seed(0)

    def rows(count: int) -> dict[str, Tensor]:
        x = torch.randn(count, 4, generator=g, dtype=F64)
        return {"x": x, "y": (x[:, 0] + 0.5 * x[:, 1] > 0).long() + (x[:, 2] > 1).long()}

    def loss(outputs: Tensor, values: Any, batch: Any) -> Tensor:
        costs = -outputs.log_softmax(1)
        hit = costs.gather(1, batch["y"][:, None])[:, 0]
        return (1 - values["smooth"]) * hit + values["smooth"] * costs.mean(1)

    def outer(outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch["y"], reduction="none")

    given = {"train": rows(30), "val": rows(20), "test": rows(10), "batch_size": 8}
    return ModuleInner(net, space, loss=loss, outer_loss=outer, dropout={"0": "p"},
                       optimizer=SGD(lr=0.05, momentum=0.9), **{**given, **options})  # fmt: skip


def _random_response(inner: ModuleInner) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    model = inner.response_model()
    return {
        name: 0.3 * torch.randn(value.shape, generator=g, dtype=F64)
        for name, value in model.initial("stn", g).items()
    }


def test_the_linearized_loss_is_the_loss_of_first_order_outputs() -> None:
    """L(ŷ(0) + (ŷ(t) - ŷ(-t))/2t), masks fixed by the seed of the batch; and its gradient."""
    inner = _module_inner()
    response, params = _random_response(inner), inner.params
    batch, seed = inner.inner_batches(1)[0]
    shift = torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    values = inner.layout.values(inner.layout.coordinates(inner.hparams) + shift)
    t = 1e-5

    def outputs(s: Tensor | None, tensors: dict[str, Tensor]) -> Tensor:
        found: Tensor = inner.objective.outputs(
            {**params, **tensors}, values, batch, seed, shift=s, training=True
        )
        return found

    def reference(tensors: dict[str, Tensor]) -> Tensor:
        up, down = outputs(t * shift, tensors), outputs(-t * shift, tensors)
        first_order = outputs(None, tensors) + (up - down) / (2 * t)
        loss: Tensor = inner.objective.functions.loss(first_order, values, batch).mean()
        return loss

    leaves = {name: value.clone().requires_grad_() for name, value in response.items()}
    ours = inner.objective.training_loss(
        {**{n: p.detach() for n, p in params.items()}, **leaves},
        values, batch, seed, shift=shift, linearized=True,
    )  # fmt: skip
    assert ours.item() == pytest.approx(reference(response).item(), rel=1e-8)
    grads = torch.autograd.grad(ours, list(leaves.values()))
    expected = torch.autograd.grad(reference(leaves), list(leaves.values()))
    for name, a, b in zip(leaves, grads, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("mode", ["stn", "delta"])
def test_the_hypergradient_is_that_of_the_validation_loss(mode: Any) -> None:
    """dL_V/dλ and dL_V/ds against central differences of L_V(w(λ + σε)) - τH."""
    inner = _module_inner()
    algorithm = SelfTuning(mode=mode, lr=0.0, sigma_lr=0.0, sigma=0.7, entropy_weight=0.01)
    state = algorithm.init(inner)
    flat = torch.cat([v.reshape(-1) for v in _random_response(inner).values()])
    state["weights"]["response"] = flat
    model = inner.response_model()
    z, s = state["z"], state["s"]
    trained = Weights(mode, None).train(
        inner, model, state["weights"], z, softplus(s), 1, random.Random(0), linearized=False
    )
    drawn = inner.state_dict()["drawn"]
    _, slopes, _ = algorithm._outer(inner, model, state, trained, 7)

    def objective(point: Tensor, scale: Tensor) -> float:
        inner._drawn = dict(drawn)
        batch = inner.outer_batch()
        noise = model.layout.noise(20, torch.Generator().manual_seed(7), z)
        coordinates = point + softplus(scale) * noise
        shift = coordinates - z if mode == "delta" else coordinates
        loss = model.outer_loss(trained.general, trained.response, shift, coordinates, batch)
        return float(loss - 0.01 * entropy(softplus(scale)))

    t = 1e-5
    for i in range(2):
        e = torch.zeros(2, dtype=F64)
        e[i] = t
        in_z = (objective(z + e, s) - objective(z - e, s)) / (2 * t)
        in_s = (objective(z, s + e) - objective(z, s - e)) / (2 * t)
        assert float(slopes["z"][i]) == pytest.approx(in_z, rel=1e-5, abs=1e-9)
        assert float(slopes["s"][i]) == pytest.approx(in_s, rel=1e-5, abs=1e-9)


def test_without_gates_the_hypergradient_is_zero() -> None:
    """Δ-STN starts there: the response must be trained before λ can move."""
    inner = _module_inner()
    algorithm = SelfTuning(train_steps=1, tune_sigma=False)
    state = algorithm.init(inner)
    state["weights"]["response"].zero_()
    report, _ = SelfTuning(train_steps=1, tune_sigma=False, response_optimizer=SGD(lr=0.0)).step(
        inner, {**state, "weights": {**state["weights"], "optimizer": {}}}
    )
    assert report.grad_norm == 0.0


def test_the_general_weights_of_delta_train_as_the_plain_network() -> None:
    """Separate objectives: whatever the response does, w is that of plain training."""
    tuned, plain = _module_inner(), _module_inner()
    tune(tuned, SelfTuning(lr=0.0, sigma_lr=0.0, train_steps=3), 12)
    # Response steps draw every other batch of the stream.
    for _ in range(12):
        plain.step()
        plain.inner_batches(1)
    for name, value in plain.params.items():
        assert torch.equal(tuned.params[name], value)


def test_nothing_of_the_outer_step_enters_the_weights() -> None:
    """One outer step at a huge outer learning rate leaves w and Θ where training put them."""
    states = []
    for lr in (0.0, 10.0):
        inner = _module_inner()
        algorithm = SelfTuning(lr=lr, train_steps=2)
        _, state = algorithm.step(inner, algorithm.init(inner))
        states.append((inner.params, state["weights"]["response"]))
    for name in states[0][0]:
        assert torch.equal(states[0][0][name], states[1][0][name])
    assert torch.equal(states[0][1], states[1][1])
