"""What each weight map promises beyond the shared checks: the cards' invariants."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from adapters import Trainer, registry, tasks
from adapters.reparam import attach, maps
from adapters.reparam.base import Start, signed_svd
from adapters.weights import EVA, HUT, SORSA, LoRASB, MiSS, SVFit
from adapters.weights.eva import redistribute
from adapters.weights.sorsa import orthogonality

D = torch.float64


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=D)


def start(w: Tensor, **given: Tensor) -> Start:
    return Start("layer", w, generator=torch.Generator().manual_seed(7), **given)


@pytest.mark.parametrize("rank", [4, 7])
def test_miss_is_the_sum_of_chunks(rank: int) -> None:
    """W x = W₀ x + Dᵀ Σ_g x[g r : (g + 1) r], with the last chunk padded by zeros."""
    w, d, x = matrix(6, 18), matrix(rank, 6, 1), matrix(5, 18, 2)
    padded = torch.nn.functional.pad(x, (0, -18 % rank))
    sums = padded.reshape(5, -1, rank).sum(dim=1)
    got = x @ MiSS(rank).weight(w, {"D": d}).T
    assert torch.allclose(got, x @ w.T + sums @ d, atol=1e-12)


def test_miss_kaiming_starts_away_from_the_weight_and_is_miss() -> None:
    """PEFT's ``init_weights=False``: ``kaiming_uniform_(D, a=√5)``, uniform in ±1/√o."""
    w, reparam = matrix(400, 18), MiSS(5, "kaiming")
    d = reparam.start(start(w)).trained["D"]
    assert d.shape == (5, 400)
    assert 0.98 / 20 < float(d.abs().max()) <= 1 / 20
    assert float(d.std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)
    assert torch.equal(reparam.weight(w, {"D": d}), MiSS(5).weight(w, {"D": d}))


def test_bat_is_affine_in_every_block_and_can_be_undone() -> None:
    w, d, r = matrix(6, 9), 0.2 * matrix(2 * 3, 3, 1).reshape(2, 3, 3), 3
    new = MiSS(r, "bat").weight(w, {"D": d})
    for q in range(2):
        for p in range(3):
            block = (slice(q * r, q * r + r), slice(p * r, p * r + r))
            assert torch.allclose(new[block], w[block] @ (torch.eye(3, dtype=D) + d[q]) + d[q])
            back = (new[block] - d[q]) @ torch.linalg.inv(torch.eye(3, dtype=D) + d[q])
            assert torch.allclose(back, w[block], atol=1e-12)
    assert int(torch.linalg.matrix_rank(new - w)) == 6


def test_sorsa_starts_orthonormal_and_its_penalty_has_no_kick() -> None:
    """The unsquared norm's gradient at an orthonormal point is a unit vector of rounding noise."""
    w = matrix(10, 14).float()
    reparam = SORSA(4, orthonormal=1.0)
    parts = dict(reparam.start(start(w)).trained)
    parts = {k: v.clone().requires_grad_() for k, v in parts.items()}
    assert float(orthogonality(parts["V"].detach())) < 1e-10
    grads = {}
    for norm in ("squared", "plain"):
        penalty = SORSA(4, orthonormal=1.0, norm=norm).penalty(parts)  # type: ignore[arg-type]
        grads[norm] = torch.autograd.grad(penalty, [parts["U"], parts["V"]])
    assert max(float(g.norm()) for g in grads["squared"]) < 1e-4
    assert max(float(g.norm()) for g in grads["plain"]) > 0.1


def test_sorsa_penalty_is_invariant_to_mixing_and_blind_to_sigma() -> None:
    u, v = matrix(10, 4, 1), matrix(4, 14, 2)
    q, _ = torch.linalg.qr(matrix(4, 4, 3))
    delta = torch.zeros(4, dtype=D, requires_grad=True)
    reparam = SORSA(4, orthonormal=0.3)
    one = reparam.penalty({"U": u, "V": v, "delta": delta})
    two = reparam.penalty({"U": u @ q, "V": q.T @ v, "delta": delta})
    assert float(one) == pytest.approx(float(two), rel=1e-12)
    assert not one.requires_grad


def test_sorsa_decays_its_singular_values_and_not_its_vectors() -> None:
    """Weight decay of U and V would fight the regularizer; δ decays towards S⁰."""
    learner = registry.get("sorsa")()
    assert isinstance(learner, Trainer)
    values = {"rank": 2, "orthonormal": 2e-6, "weight_decay": 0.05}
    learner.setup(tasks.get("digits_transfer"), values, seed=0)
    model, method = learner._assembly.model, learner.method
    for layer in maps(model).values():
        layer.parts["delta"].data.fill_(1.5)
    penalty = method.penalty(model, {**method.setting.constants, **learner.hparams})
    assert penalty is not None
    named = dict(model.named_parameters())
    grads = dict(
        zip(
            learner.params,
            torch.autograd.grad(penalty, [named[n] for n in learner.params], allow_unused=True),
            strict=True,
        )
    )
    for name, grad in grads.items():
        assert grad is not None
        if name.endswith((".U", ".V")):
            assert float(grad.abs().max()) < 1e-6
        else:
            assert torch.allclose(grad, 0.05 * named[name].detach())


def test_sorsa_sigma_rate_is_a_ratio_of_learning_rates() -> None:
    """One step of Adam on δ moves S by κ times what it moves without κ."""
    w = matrix(10, 14)
    moved = {}
    for kappa in (1.0, 4.0):
        reparam = SORSA(4, sigma_rate=kappa)
        made = reparam.start(start(w))
        delta = made.trained["delta"].clone().requires_grad_()
        parts = {**made.trained, **made.fixed, "delta": delta}
        optimizer = torch.optim.Adam([delta], lr=1e-3, eps=1e-30)
        (reparam.weight(w, parts) * matrix(10, 14, 5)).sum().backward()
        optimizer.step()
        moved[kappa] = kappa * delta.detach()
    assert torch.allclose(moved[4.0], 4 * moved[1.0], rtol=1e-12)


def test_hut_keeps_zeros_and_scales_with_the_weight() -> None:
    w = matrix(6, 8)
    w[w.abs() < 0.5] = 0
    for form in ("residual", "direct"):
        reparam = HUT(3, form, std=0.4)  # type: ignore[arg-type]
        made = reparam.start(start(w))
        parts = {**made.trained, **made.fixed, "A": made.trained["A"] + matrix(6, 3, 4)}
        new = reparam.weight(w, parts)
        assert torch.equal(new == 0, w == 0)
        assert torch.allclose(reparam.weight(-2.5 * w, parts), -2.5 * new, rtol=1e-12)
    ones = {"A": matrix(6, 1, 2), "B": torch.zeros(1, 8, dtype=D), "noise": torch.ones(1, 8).to(D)}
    rows = HUT(1, std=1.0).weight(w, ones)
    assert torch.allclose(rows, (1 + ones["A"]) * w, rtol=1e-12)


def test_svfit_moves_singular_values_only() -> None:
    w = matrix(7, 9)
    u, sigma, vt = signed_svd(w)
    made = SVFit().start(start(w))
    delta = 0.1 * matrix(1, 7, 3)[0] * sigma
    parts = {**made.fixed, "delta": delta}
    expected = (u * (sigma + delta)) @ vt
    assert torch.allclose(SVFit().weight(w, parts), expected, atol=1e-12)
    relative = SVFit(exponent=1.0).weight(w, {**parts, "delta": delta / sigma})
    assert torch.allclose(relative, expected, atol=1e-12)
    logarithmic = SVFit(form="log").weight(w, {**parts, "delta": torch.log1p(delta / sigma)})
    assert torch.allclose(logarithmic, expected, atol=1e-12)
    assert float(SVFit(anchor=2.0).penalty(parts)) == pytest.approx(2 * float(delta @ delta))


def test_lora_sb_starts_with_the_best_approximation_of_the_first_step() -> None:
    w, gradient, eta, r = matrix(8, 10), matrix(8, 10, 1), 1e-3, 3
    for scale in (1.0, 2.5):  # published code moves the start with s; here it does not
        reparam = LoRASB(r, first_step=eta, scale=scale)
        made = reparam.start(start(w, gradient=gradient))
        parts = {**made.trained, **made.fixed}
        change = reparam.weight(w, parts) - w
        u, sigma, vt = torch.linalg.svd(-eta * gradient.sign())
        best = (u[:, :r] * sigma[:r]) @ vt[:r]
        assert torch.allclose(change, best, atol=1e-14)
        rest = (change + eta * gradient.sign()).square().sum()
        assert float(rest) == pytest.approx(float(sigma[r:].square().sum()), rel=1e-9)
        b, a = parts["B"], parts["A"]
        for gram in (b.T @ b, a @ a.T):
            assert torch.allclose(gram, torch.eye(r, dtype=D), atol=1e-12)
        core = parts["R"].clone().requires_grad_()
        (reparam.weight(w, {**parts, "R": core}) * gradient).sum().backward()
        assert core.grad is not None
        assert torch.allclose(core.grad, scale * b.T @ gradient @ a.T, atol=1e-12)
    raw = LoRASB(8, transform="raw", first_step=1.0)
    made = raw.start(start(w, gradient=gradient))
    change = raw.weight(w, {**made.trained, **made.fixed}) - w
    assert torch.allclose(change, -gradient / gradient.norm() * math.sqrt(80), atol=1e-12)


def test_eva_is_the_pca_of_the_inputs() -> None:
    from sklearn.decomposition import PCA

    w, x = matrix(6, 9), matrix(50, 9, 1) * torch.arange(1, 10, dtype=D) + 3.0
    pca = PCA(3).fit(x.numpy())
    made = EVA(3).start(start(w, inputs=x))
    v = made.fixed["V"]
    angles = torch.linalg.svdvals(v @ torch.from_numpy(pca.components_).T)
    assert torch.allclose(angles, torch.ones(3, dtype=D), atol=1e-10)
    assert torch.allclose(v @ v.T, torch.eye(3, dtype=D), atol=1e-10)
    ratio = torch.from_numpy(pca.singular_values_ / pca.singular_values_[0])
    assert torch.allclose(made.fixed["sigma"], ratio, atol=1e-10)
    plain = EVA(3, center=False).start(start(w, inputs=x)).fixed["V"]
    assert float((plain[0] @ x.mean(0) / x.mean(0).norm()).abs()) > 0.9, "the mean comes first"
    b = matrix(6, 3, 2)
    whitened = EVA(3, exponent=0.5).weight(w, {**made.trained, **made.fixed, "B": b})
    assert torch.allclose(whitened, w + b @ (v / ratio.sqrt()[:, None]), atol=1e-10)


def test_eva_gives_ranks_to_the_layers_that_explain_most() -> None:
    """Two layers: one with inputs of rank 2, one with eight equal directions."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"narrow": nn.Linear(10, 9), "wide": nn.Linear(10, 9)}).double()
    low, high = matrix(60, 2) @ matrix(2, 10, 1), matrix(60, 10, 2)

    def calibrate(m: nn.Module) -> None:
        model["narrow"](low), model["wide"](high)

    names = ["narrow", "wide"]
    ranks = {k: v.rank for k, v in redistribute(model, EVA(4), names, calibrate).items()}
    assert ranks["narrow"] + ranks["wide"] == 8
    assert max(ranks.values()) <= 8
    assert ranks["narrow"] >= 2
    uniform = redistribute(model, EVA(4), names, calibrate, headroom=1.0)
    assert {k: v.rank for k, v in uniform.items()} == {"narrow": 4, "wide": 4}
    one = redistribute(model, EVA(1), names, calibrate, headroom=2.0)
    assert {k: v.rank for k, v in one.items()} == {"narrow": 2}, "a layer may get none"
    attach(model, one, calibrate=calibrate)
    assert list(maps(model)) == ["narrow"]
    with pytest.raises(ValueError, match=r"headroom must be at least 1, but got 0.5"):
        redistribute(model, EVA(1), names, calibrate, headroom=0.5)
    fresh = nn.ModuleDict({"narrow": nn.Linear(10, 9)}).double()

    def run(m: nn.Module) -> None:
        fresh["narrow"](low)

    with pytest.raises(ValueError, match="metric must be one of"):
        redistribute(fresh, EVA(1), ["narrow"], run, metric="mean")  # type: ignore[arg-type]
