"""PZOBO: the response of the inner training to the hyperparameters, by random differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from hypergrad.attention import math_attention
from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.first_order import check_precision, devices, inner_gradients, replayed
from hypergrad.flat import FlatSpace
from hypergrad.optimizers import Optimizer, as_optimizer
from hypergrad.optimizers.base import State
from hypergrad.optimizers.flat import flatten, widen
from hypergrad.optimizers.values import constants, tuned
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Problem
from hypergrad.randomness import RandomState
from hypergrad.status import Status
from hypergrad.training import Loop, check_optimizer, check_steps, detached
from hypergrad.tree import Leaves, Tree, hyper_leaves, trainable_leaves

__all__ = ["PZOBO", "PZOBOState"]


class PZOBOState(TypedDict):
    """What continues from one call to the next.

    Attributes:
        optimizer: state of the inner optimizer after the last step; None before the first call.
        generator: state of the generator of the directions, a byte tensor on the CPU.
    """

    optimizer: State | None
    generator: Tensor


@dataclass(frozen=True)
class PZOBO(Estimator[PZOBOState]):
    """dF/dh with the response Jacobian dw_T/dh estimated from perturbed inner trajectories:

        dF/dh ≈ ∂F/∂h + 1/Q Σⱼ ⟨δⱼ, ∂F/∂w⟩ uⱼ,   δⱼ = [w_T(h + μuⱼ) − w_T(h)] / μ.

    All Q + 1 trajectories start from `params` and the optimizer state, with the same batches and
    random numbers; only ∂F/∂w and ∂F/∂h are gradients.  Nothing in the inner training has to be
    differentiable in h, not even once.

    For Gaussian uⱼ the second term is an unbiased estimate of the derivative of w_T smoothed by
    N(0, μ²I), exact in expectation where w_T is linear in h.  Its variance grows with the number
    p of hyperparameters: for a linear response with exact second term g, the covariance is
    (‖g‖² I + ggᵀ) / Q, a relative variance of (p + 1)/Q.  With `orthogonal` directions, uniformly
    drawn, of length √p, the mean is the same and the relative variance (p − Q)/Q: none at Q = p.

    Hyperparameters that do not enter the inner level are not perturbed.  Those that do move by
    about μ in each entry: where a loss or an optimizer needs a positive value, tune its logarithm.

    Cost: Q + 1 inner trainings; memory of plain training, however long.  Losses under bfloat16
    autocast round by about what μ changes: compute them in float32, or take a larger μ.

    Source: Sow, Ji and Liang, On the convergence theory for Hessian-free bilevel algorithms,
    NeurIPS 2022, algorithm 1.

    Attributes:
        optimizer: the inner update rule: ours, a TorchOpt transformation, or None for the rule
            that an inner learner trains with (an outer algorithm fills it in).
        steps: T ≥ 1.
        directions: Q ≥ 1.
        smoothing: μ > 0, in the units of h.
        orthogonal: draw orthogonal directions; Q must not exceed p then.
        seed: of the directions.
    """

    optimizer: Optimizer | None = None
    steps: int = 0
    directions: int = 10
    smoothing: float = 0.01
    orthogonal: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_steps("PZOBO", self.steps)
        object.__setattr__(self, "optimizer", as_optimizer(self.optimizer))
        if not isinstance(self.directions, int) or self.directions < 1:
            raise ValueError(
                f"PZOBO directions must be an integer of at least 1, but got {self.directions!r}."
            )
        if not self.smoothing > 0:
            raise ValueError(f"PZOBO smoothing must be positive, but got {self.smoothing!r}.")

    def init(self, problem: Problem, params: Tree, hparams: Tree) -> PZOBOState:
        generator = torch.Generator().manual_seed(self.seed)
        return {"optimizer": None, "generator": generator.get_state()}

    def __call__(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        inner_batch: Any,
        outer_batch: Any,
        state: PZOBOState,
    ) -> tuple[Hypergradient, PZOBOState]:
        """Train from `params`, at h and at each perturbed h.

        Raises:
            ValueError: a hyperparameter that enters neither loss nor the optimizer; more
                orthogonal directions than hyperparameters; params in bfloat16 or float16; a
                perturbed value that the optimizer refuses; see also `train`.
            FloatingPointError: a loss, gradient or parameter is not finite.
        """
        optimizer = check_optimizer("PZOBO", self.optimizer)
        leaves, hyper = trainable_leaves(params), hyper_leaves(hparams)
        check_precision("PZOBO", leaves)
        random = RandomState.capture(devices(leaves, hyper))

        def trajectory(h: Leaves) -> tuple[Loop, Tensor, State]:
            values = constants(optimizer.resolve(h.tree(), leaves))
            loop = Loop(problem, leaves, h, optimizer, values, inner_batch)
            flat, inner = loop.start(state["optimizer"])
            for t in range(self.steps):
                _, flat, inner = loop.step(t, flat, inner)
            return loop, flat, inner

        with math_attention():
            h = detached(hyper)
            loop, flat, after = trajectory(h)
            value, v, direct = outer_gradients(problem, loop.at(flat), hyper, outer_batch)
            slope = widen(flatten(v))
            with replayed(random):
                entered = _entered(loop, hyper)
            moving = [t for t, inside in zip(h.tensors, entered, strict=True) if inside]
            space = FlatSpace.of(moving)
            indirect: list[Tensor | None] = [None] * len(entered)
            generator = torch.Generator()
            generator.set_state(state["generator"])
            if moving:
                total = torch.zeros_like(space.pack(moving))
                for u in self._draw(generator, total):
                    perturbed = iter(
                        torch.add(t, d.to(t), alpha=self.smoothing)
                        for t, d in zip(moving, space.unpack(u), strict=True)
                    )
                    tensors = [
                        next(perturbed) if inside else t
                        for t, inside in zip(h.tensors, entered, strict=True)
                    ]
                    with replayed(random):
                        _, end, _ = trajectory(replace(h, tensors=tensors))
                    delta = (widen(end) - widen(flat)) / self.smoothing
                    total += torch.dot(delta, slope).to(total) * u / self.directions
                pieces = iter(space.unpack(total))
                indirect = [next(pieces) if inside else None for inside in entered]

        hypergradient = Hypergradient(
            value=value,
            grad=total_gradient(hyper, direct, indirect, ", nor the optimizer"),
            params=loop.params(flat),
            residual=None,
            error_bound=None,
            n_hvp=0,
            n_grad=self.steps * (1 + self.directions * bool(moving)) + 2,
            status=Status.APPROXIMATE,
        )
        return hypergradient, {"optimizer": after, "generator": generator.get_state()}

    def _draw(self, generator: torch.Generator, like: Tensor) -> Iterator[Tensor]:
        """Yield Q directions u with E[u uᵀ] = I, the same on every device."""
        size = like.numel()

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        if not self.orthogonal:
            return (normal(size).to(like) for _ in range(self.directions))
        if self.directions > size:
            raise ValueError(
                f"PZOBO: there are only {size} orthogonal directions in the hyperparameters, but "
                f"directions={self.directions}."
            )
        # Signs do not matter: u enters twice.
        basis, _ = torch.linalg.qr(normal(size, self.directions))
        return iter((math.sqrt(size) * basis.T).to(like))


def _entered(loop: Loop, hyper: Leaves) -> Sequence[bool]:
    """Whether each hyperparameter enters the inner loss, on its first batch, or the optimizer."""
    flat = flatten(loop.leaves.tensors).detach()
    at = loop.at(flat)
    _, _, found = inner_gradients(loop.problem, at, hyper, loop.batch_at(0))
    with torch.enable_grad():
        values = tuned(loop.optimizer.resolve(hyper.tree(), loop.leaves))
        through: Sequence[Tensor | None] = [None] * len(found)
        if values:
            sums = [v.sum() for v in values.values()]
            through = torch.autograd.grad(sums, hyper.tensors, allow_unused=True)
    return [a is not None or b is not None for a, b in zip(found, through, strict=True)]
