"""Training steps on general weights w and responses Θ, together or apart."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.algorithm import Diverged
from bilevel.inner import Inner
from bilevel.inner_loop import Steps
from bilevel.metrics import Cost
from bilevel.self_tuning.response import Mode, ResponseModel, Tensors
from hypergrad.attention import math_attention
from hypergrad.optimizers import SGD, Hyper, Optimizer
from hypergrad.optimizers.flat import flatten, unflatten
from hypergrad.optimizers.values import constants
from hypergrad.training import is_finite
from hypergrad.tree import Leaves, Tree, trainable_leaves, zeros_for_none

__all__ = ["Trained", "Weights", "hyper_names"]


@dataclass(frozen=True)
class Trained:
    """What training steps left.

    Attributes:
        state: of `Weights`.
        general: w, detached.
        response: Θ by name, detached.
        loss: L_T of the last step.
        response_loss: L_T of the last response step.
        response_grad_norm: norm of its gradient in Θ.
        cost: work done.
    """

    state: dict[str, Any]
    general: Tree
    response: Tensors
    loss: float | None
    response_loss: float
    response_grad_norm: float
    cost: Cost


@dataclass(frozen=True)
class Weights:
    """Trains w and Θ.

    The state holds Θ as one flat vector with names and shapes, and the optimizer's state.  In
    Δ-STN w belongs to the inner level.  In STN the state also holds w and its optimizer, and the
    inner level is given the weights that respond, w(λ), so that they can be evaluated there.
    """

    mode: Mode
    rule: Optimizer | None

    def init(self, inner: Inner, response: Tensors) -> dict[str, Any]:
        """Return the state before the first step.

        Raises:
            ValueError: the rule of Θ has a hyperparameter that is tuned.
        """
        flat = flatten(list(response.values()))
        state: dict[str, Any] = {
            "names": list(response),
            "shapes": [list(value.shape) for value in response.values()],
            "response": flat,
            "optimizer": self._rule(inner).init(flat),
        }
        if self.mode == "stn":
            leaves = trainable_leaves(inner.params)
            state["general"] = flatten(leaves.tensors)
            own = inner.optimizer_state
            state["general_optimizer"] = inner.optimizer.start(own, state["general"])
        return state

    def train(
        self,
        inner: Inner,
        model: ResponseModel,
        state: dict[str, Any],
        z: Tensor,
        sigma: Tensor,
        steps: int,
        draw: random.Random,
        *,
        linearized: bool,
    ) -> Trained:
        """Train for a number of steps at λ = z.

        Raises:
            Diverged: a loss, gradient or weight is not finite.
        """
        run = _Run(self.mode, inner, model, z, sigma, draw, linearized)
        rule, flat, memory = self._rule(inner), state["response"], state["optimizer"]
        like = [torch.empty(shape, device="meta") for shape in state["shapes"]]
        values = constants(rule.resolve({}, Leaves([flat], ["response"], list)))
        leaves = trainable_leaves(inner.params)
        general, general_memory = state.get("general"), state.get("general_optimizer")
        cost, loss, seen, norm = Cost(), None, math.nan, math.nan
        own_values = constants(inner.optimizer.resolve(inner.hparams, leaves))
        for _ in range(steps):
            if general is None:
                try:
                    plain = Steps(1).train(inner)
                except Diverged as error:
                    raise Diverged(str(error), cost + error.cost) from error
                cost, loss = cost + plain.cost, plain.loss
                weights = optree.tree_map(torch.Tensor.detach, inner.params)
                w_views: list[Tensor] = []
            else:
                w_views = [v.requires_grad_() for v in unflatten(general, leaves.tensors)]
                weights = leaves.rebuild(w_views)
            t_views = [v.requires_grad_() for v in unflatten(flat, like)]
            response = dict(zip(state["names"], t_views, strict=True))
            cost += Cost(steps=int(general is not None), gradients=1)
            seen, grads = run.gradient(weights, response, [*t_views, *w_views], cost)
            split = len(t_views)
            grad = flatten(grads[:split])
            norm = float(grad.norm())
            with torch.no_grad():
                flat, memory = rule.update(flat, grad, memory, values)
                if general is not None:
                    assert general_memory is not None
                    general, general_memory = inner.optimizer.update(
                        general, flatten(grads[split:]), general_memory, own_values
                    )
            if not is_finite(flat) or (general is not None and not is_finite(general)):
                raise Diverged("weights or responses are not finite after a training step", cost)
        after = {**state, "response": flat, "optimizer": memory}
        found = dict(zip(state["names"], unflatten(flat, like), strict=True))
        if general is None:
            weights = optree.tree_map(torch.Tensor.detach, inner.params)
        else:
            loss = seen
            after |= {"general": general, "general_optimizer": general_memory}
            weights = leaves.rebuild(unflatten(general, leaves.tensors))
            with torch.no_grad():
                effective = model.effective(weights, found, z)
            marked = optree.tree_map(
                lambda new, old: new.detach().clone().requires_grad_(old.requires_grad),
                effective,
                inner.params,
            )
            inner.adopt(marked, general_memory, steps)
        return Trained(after, weights, found, loss, seen, norm, cost)

    def _rule(self, inner: Inner) -> Optimizer:
        if self.rule is not None:
            named = hyper_names(self.rule)
            if named:
                raise ValueError(
                    f"SelfTuning: response_optimizer must have constant numbers, but it reads "
                    f"the hyperparameters {sorted(named)}."
                )
            return self.rule
        plain = all(isinstance(v, float | int) for v in inner.optimizer.hyperparameters.values())
        return inner.optimizer if plain else SGD(lr=0.01, momentum=0.9)


@dataclass(frozen=True)
class _Run:
    """What stays the same over some training steps."""

    mode: Mode
    inner: Inner
    model: ResponseModel
    z: Tensor
    sigma: Tensor
    draw: random.Random
    linearized: bool

    def gradient(
        self, weights: Tree, response: Tensors, wanted: list[Tensor], cost: Cost
    ) -> tuple[float, list[Tensor]]:
        """Return the perturbed training loss on the next batch, and its gradient."""
        batch, given = self.model.draw()
        generator = torch.Generator().manual_seed(self.draw.getrandbits(62))
        layout = self.model.layout
        noise = layout.noise(self.model.rows(batch), generator, self.z)
        coordinates = self.z + self.sigma * noise
        if given is not None:  # augmented elsewhere; what acts on weights is perturbed here
            own = coordinates
            coordinates = given.to(self.z).clone()
            for name in layout.per_batch:
                coordinates[:, layout.columns[name]] = own[:, layout.columns[name]]
        shift = coordinates - self.z if self.mode == "delta" else coordinates
        with math_attention():
            loss = self.model.training_loss(
                weights, response, shift, coordinates, batch, self.linearized
            )
            value = float(loss.detach())
            if not math.isfinite(value):
                raise Diverged(f"the perturbed training loss is {value}", cost)
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
        return value, zeros_for_none(found, wanted)


def hyper_names(rule: Optimizer) -> set[str]:
    """Return the hyperparameters that an update rule reads."""
    leaves = [
        leaf
        for value in rule.hyperparameters.values()
        for leaf in optree.tree_leaves(value, none_is_leaf=True)
    ]
    return {leaf.name for leaf in leaves if isinstance(leaf, Hyper)}
