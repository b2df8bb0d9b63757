"""The estimator contract: frozen config, explicit state, a hypergradient that reports itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import optree
import torch
from torch import Tensor

from hypergrad.compiled.report import CompileReport
from hypergrad.problem import Problem
from hypergrad.status import Status
from hypergrad.tree import Tree

__all__ = ["Estimator", "Hypergradient"]

StateT = TypeVar("StateT")


@dataclass(frozen=True)
class Hypergradient:
    """dF/dh = ∂F/∂h + (dw/dh)ᵀ ∂F/∂w, and how it was obtained.

    Attributes:
        value: outer loss F(w, h) at `params`, a detached scalar.
        grad: dF/dh, a tree with the structure, shapes and dtypes of hparams
            (float32 where hparams are narrower).
        params: the inner iterate w at which F was evaluated, detached, marked with the
            `requires_grad` of the caller's params: the point to train on from.
        residual: ‖Hq − ∂F/∂w‖ / ‖∂F/∂w‖ of the linear system, where one was solved.
        error_bound: upper bound on ‖grad − exact‖₂, where one is certified.
        n_hvp: Hessian-vector products used.
        n_grad: gradient evaluations used (inner and outer).
        status: see `Status`.
        compiled: what compiling did, where it was asked for.
    """

    value: Tensor
    grad: Tree
    params: Tree
    residual: float | None
    error_bound: float | None
    n_hvp: int
    n_grad: int
    status: Status
    compiled: CompileReport | None = None

    @property
    def norm(self) -> float:
        """‖dF/dh‖₂ over all leaves."""
        leaves = optree.tree_leaves(self.grad)
        return float(
            torch.linalg.vector_norm(torch.stack([g.double().norm().cpu() for g in leaves]))
        )


class Estimator(ABC, Generic[StateT]):
    """A way to compute a hypergradient.  Subclasses are frozen dataclasses.

    An estimator never changes its arguments: params, hparams and module buffers are as before
    the call.  Random draws of the losses from the global generators go on as in training: one
    draw per evaluation, so that two calls see different dropout masks; an evaluation that is
    recomputed sees its first masks again and draws nothing more.
    """

    @property
    def steps(self) -> int:
        """Inner steps that one call itself runs from `params`; 0 if it differentiates there."""
        return 0

    @abstractmethod
    def init(self, problem: Problem, params: Tree, hparams: Tree) -> StateT:
        """Return the state before the first call: a dict of tensors and numbers (storable)."""

    @abstractmethod
    def __call__(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        inner_batch: Any,
        outer_batch: Any,
        state: StateT,
    ) -> tuple[Hypergradient, StateT]:
        """Estimate dF/dh.

        Args:
            problem: the two losses.
            params: inner parameters w; leaves that require grad are trained, others constant.
            hparams: hyperparameters h; every leaf must be floating and require grad.
            inner_batch: third argument of the inner loss.  An estimator with `steps` > 0
                also takes a callable t -> batch, for another batch at each step.
            outer_batch: third argument of the outer loss.
            state: from `init` or the last call.
        """
