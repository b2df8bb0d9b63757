"""`SelfTuning`: STN and Δ-STN as outer algorithms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from bilevel.algorithm import Diverged, OuterAlgorithm, OuterStep
from bilevel.checkpoint import copy
from bilevel.checks import integer, real
from bilevel.inner import Inner
from bilevel.metrics import Cost
from bilevel.outer_optimizer import OptimizerFactory, optimizer_step
from bilevel.self_tuning.layout import Layout
from bilevel.self_tuning.reach import check_reach
from bilevel.self_tuning.response import Mode, ResponseModel, response_model
from bilevel.self_tuning.scale import clamped, entropy, inverse_softplus, softplus
from bilevel.self_tuning.weights import Trained, Weights
from bilevel.single_loop.draws import chance
from bilevel.single_loop.rates import Decay, Rate, rate
from hypergrad.optimizers import Optimizer

__all__ = ["SelfTuning", "SelfTuningState"]


class SelfTuningState(TypedDict):
    """State of `SelfTuning`, plain data.

    Attributes:
        step: outer steps done.
        z: λ, shape (n,).
        s: unconstrained scale of the perturbation, shape (n,).
        previous: λ before the last move; None before the first.
        scale: what is left of the outer learning rate after retreats.
        weights: responses, gates and their optimizer; in STN also the general weights.
        optimizer: state of the outer optimizer; None before its first step.
    """

    step: int
    z: Tensor
    s: Tensor
    previous: Tensor | None
    scale: float
    weights: dict[str, Any]
    optimizer: dict[str, Any] | None


@dataclass(frozen=True)
class SelfTuning(OuterAlgorithm[SelfTuningState]):
    """Train one network that knows how its weights respond to λ, and descend on λ through that.

    The weights w(λ') = w + Θ s respond to a shift s of the hyperparameters, structured so that
    each output row is scaled (see `bilevel.self_tuning.layers`); Θ stands for all responses and
    gates.  An outer step takes `train_steps` steps on the training loss L_T at randomly perturbed
    λ' = λ + σ ⊙ ε, then one step on λ and σ on

        E_ε L_V(w(λ + σ ⊙ ε)) - τ H[N(λ, σ²)],     differentiated through the response only.

    No Hessian, no unrolling, and no derivative of L_T in λ: dropout rates, augmentations and
    rounded integers can be tuned.  What does not enter L_T cannot: learning rates, sizes.

    - mode "delta" (Δ-STN): s = λ' - λ, so that w itself belongs to λ.  w is trained by the inner
      level's own steps, on L_T without perturbation; Θ by steps of its own on E_ε L_T with w
      fixed, where possible at the outputs ŷ(w) + J Θ s linearized in the response.
    - mode "stn": s = λ'.  w and Θ are trained together on E_ε L_T(λ', w(λ')).

    A `ModuleInner` has one ε per example; any other inner level one per minibatch, and no
    linearization.  Cost of an outer step in gradients: `train_steps` (STN) or twice that (Δ-STN),
    plus 1.

    Attributes:
        mode: "delta" or "stn".
        lr: outer learning rate of λ, a number or a `Decay`.
        optimizer: a `torch.optim` class for λ and σ.
        train_steps: training steps for each outer step.
        warmup: further training steps before the first outer step, λ fixed.
        sigma: initial σ, or one by name.
        tune_sigma: whether σ moves.
        sigma_lr: learning rate of σ; None for `lr`.
        sigma_bounds: σ is kept in them: no signal for Θ below, no affine response above.
        entropy_weight: τ.
        response_optimizer: update rule of Θ; None for the inner level's.
        linearize: linearized response steps of Δ-STN; None where the inner level can.
        seed: of all perturbations.

    Sources: MacKay, Vicol, Lorraine, Duvenaud & Grosse, ICLR 2019, Algorithm 1; Bae & Grosse,
    NeurIPS 2020, Algorithm 1.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range.
    """

    mode: Mode = "delta"
    lr: Rate = 0.01
    optimizer: OptimizerFactory = torch.optim.RMSprop
    train_steps: int = 5
    warmup: int = 0
    sigma: float | Mapping[str, float] = 0.5
    tune_sigma: bool = True
    sigma_lr: Rate | None = None
    sigma_bounds: tuple[float, float] = (0.05, 1.0)
    entropy_weight: float = 1e-3
    response_optimizer: Optimizer | None = None
    linearize: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("stn", "delta"):
            raise ValueError(f"SelfTuning: mode must be 'stn' or 'delta', but got {self.mode!r}.")
        for name, least in (("train_steps", 1), ("warmup", 0), ("seed", 0)):
            integer(f"SelfTuning: {name}", getattr(self, name), least)
        for name in ("lr", "sigma_lr"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Decay):
                _at_least_zero(name, value)
        _at_least_zero("entropy_weight", self.entropy_weight)
        low, high = self.sigma_bounds
        if not 0 < low <= high < math.inf:
            raise ValueError(
                f"SelfTuning: sigma_bounds must be 0 < low <= high, but got {self.sigma_bounds!r}."
            )
        named = self.sigma if isinstance(self.sigma, Mapping) else {"": self.sigma}
        for name, value in named.items():
            where = f"SelfTuning: sigma[{name!r}]" if name else "SelfTuning: sigma"
            if not low <= real(where, value) <= high:
                raise ValueError(f"{where} must be in sigma_bounds [{low}, {high}], but got "
                                 f"{value!r}.")  # fmt: skip
        if self.linearize and self.mode == "stn":
            raise ValueError("SelfTuning: linearize=True belongs to mode='delta'; STN fits the "
                             "perturbed network itself.")  # fmt: skip

    def init(self, inner: Inner) -> SelfTuningState:
        """See `OuterAlgorithm.init`.

        Raises:
            ValueError: a hyperparameter that cannot be tuned this way (says why); `sigma` does not
                name each; the inner level cannot be linearized, or not be tuned in this mode.
        """
        model = response_model(inner)
        layout = model.layout
        if self.linearize and not model.can_linearize:
            raise ValueError(
                "SelfTuning: linearize=True needs the outputs of a network, but this inner level "
                "shows its losses only; use a ModuleInner, or leave linearize out."
            )
        z = layout.coordinates(inner.hparams).detach().clone()
        try:
            sigma = layout.spread(self.sigma, z)
        except ValueError as error:
            raise ValueError(f"SelfTuning: sigma: {error}") from error
        check_reach(inner, model, z)
        generator = torch.Generator().manual_seed(chance(self.seed, -1).getrandbits(62))
        response = copy(model.initial(self.mode, generator))
        weights = Weights(self.mode, self.response_optimizer).init(inner, response)
        _set(inner, layout, z)
        return {
            "step": 0,
            "z": z,
            "s": inverse_softplus(sigma),
            "previous": None,
            "scale": 1.0,
            "weights": weights,
            "optimizer": None,
        }

    def next_steps(self, state: SelfTuningState) -> int:
        """See `OuterAlgorithm.next_steps`."""
        return self.train_steps + (self.warmup if state["step"] == 0 else 0)

    def step(self, inner: Inner, state: SelfTuningState) -> tuple[OuterStep, SelfTuningState]:
        """See `OuterAlgorithm.step`."""
        model, k = response_model(inner), state["step"]
        draw = chance(self.seed, k)
        sigma = softplus(state["s"])
        model.publish(state["z"], sigma)
        linearized = self.linearize if self.linearize is not None else model.can_linearize
        trained = Weights(self.mode, self.response_optimizer).train(
            inner, model, state["weights"], state["z"], sigma, self.next_steps(state), draw,
            linearized=linearized and self.mode == "delta",
        )  # fmt: skip
        seen = dict(inner.hparams)
        loss, slopes, cost = self._outer(inner, model, state, trained, draw.getrandbits(62))
        norms = {n: float(g.double().norm()) for n, g in model.layout.split(slopes["z"]).items()}
        z, s, optimizer, count = self._move(state, slopes)
        _set(inner, model.layout, z)
        spread = {
            f"sigma/{name}": float(value.mean())
            for name, value in model.layout.split(softplus(s)).items()
        }
        report = OuterStep(
            loss=loss,
            hparams=seen,
            grad_norms=norms,
            inner_loss=trained.loss,
            cost=cost,
            estimate="response",
            extra={
                "lr_scale": state["scale"],
                "response_loss": trained.response_loss,
                "response_grad_norm": trained.response_grad_norm,
                "sigma_clamped": float(count),
                **spread,
            },
        )
        return report, {
            "step": k + 1,
            "z": z,
            "s": s,
            "previous": state["z"],
            "scale": state["scale"],
            "weights": trained.state,
            "optimizer": optimizer,
        }

    def retreat(self, inner: Inner, state: SelfTuningState) -> SelfTuningState | None:
        """Halve the last move of λ and the learning rate; see `OuterAlgorithm.retreat`."""
        if state["previous"] is None:
            return None
        z = torch.lerp(state["previous"], state["z"], 0.5)
        _set(inner, response_model(inner).layout, z)
        return {**state, "z": z, "scale": state["scale"] / 2}

    def _outer(
        self,
        inner: Inner,
        model: ResponseModel,
        state: SelfTuningState,
        trained: Trained,
        seed: int,
    ) -> tuple[float, dict[str, Tensor], Cost]:
        """Return L_V - τH, its derivatives in λ and s, and the cost of the whole step."""
        z, s = (t.detach().requires_grad_() for t in (state["z"], state["s"]))
        batch = inner.outer_batch()
        sigma = softplus(s)
        coordinates = z
        if self.tune_sigma:
            noise = model.layout.noise(
                model.rows(batch), torch.Generator().manual_seed(seed), state["z"]
            )
            coordinates = z + sigma * noise
        shift = coordinates - (state["z"] if self.mode == "delta" else 0.0)
        cost = trained.cost + Cost(gradients=1)
        loss = model.outer_loss(trained.general, trained.response, shift, coordinates, batch)
        total = loss - self.entropy_weight * entropy(sigma) if self.tune_sigma else loss
        found = torch.autograd.grad(total, [z, s], allow_unused=True, materialize_grads=True)
        slopes = dict(zip(("z", "s"), found, strict=True))
        value = float(loss.detach())
        norm = float(sum(g.double().square().sum() for g in found))
        if not (math.isfinite(value) and math.isfinite(norm)):
            names = [n for n, g in model.layout.split(found[0]).items() if not g.isfinite().all()]
            raise Diverged(
                f"the validation loss is {value}, its derivative not finite in {names or 'none'}",
                cost,
            )
        return value, slopes, cost

    def _move(
        self, state: SelfTuningState, slopes: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Any], int]:
        """Return the next λ and s, the optimizer's state, and how many σ met a bound."""
        k, scale = state["step"], state["scale"]
        moving = {"z": state["z"], "s": state["s"]} if self.tune_sigma else {"z": state["z"]}
        of_sigma = self.lr if self.sigma_lr is None else self.sigma_lr
        rates = {"z": scale * rate(self.lr, k), "s": scale * rate(of_sigma, k)}
        moved, optimizer = optimizer_step(
            self.optimizer, moving, {n: slopes[n] for n in moving}, rates, state["optimizer"]
        )
        s, count = clamped(moved.get("s", state["s"]), *self.sigma_bounds)
        return moved["z"], s, optimizer, count


def _at_least_zero(name: str, value: Any) -> None:
    if real(f"SelfTuning: {name}", value) < 0:
        raise ValueError(f"SelfTuning: {name} must be >= 0, but got {value!r}.")


def _set(inner: Inner, layout: Layout, z: Tensor) -> None:
    """Put the inner level at λ."""
    with torch.no_grad():
        inner.set_hparams(inner.space.constrain(layout.split(z)))
