"""`Solver`: the inner level of a nested problem as a differentiable function of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Generic, TypedDict, TypeVar, cast

import optree
import torch
from torch import Tensor, nn

from hypergrad.implicit import Implicit, ImplicitState
from hypergrad.implicit_solution import ImplicitRun, pairing
from hypergrad.modules import view
from hypergrad.optimizers import Optimizer, State
from hypergrad.problem import Problem, module_problem
from hypergrad.solution import Report, Run, descend, solution
from hypergrad.solver_arguments import check_method, update_rule
from hypergrad.swap import Swap
from hypergrad.tree import Leaves, Tree, check_tensors, hyper_leaves, leaf_names, trainable_leaves
from hypergrad.unrolled import Unrolled
from hypergrad.unrolled_solution import ForwardRun, UnrolledRun
from hypergrad.views import TwoViewLoss

__all__ = ["Solver", "SolverState"]

ModelT = TypeVar("ModelT")


class SolverState(TypedDict):
    """What a solver carries from one call to the next.

    Attributes:
        params: the last solution, where ``warm_start=True``; None before the first call.
        optimizer: state of the optimizer there.
        implicit: where the linear solver of `Implicit` starts.
    """

    params: list[Tensor] | None
    optimizer: State | None
    implicit: ImplicitState


class Solver(Generic[ModelT]):
    """w*(h): trains a model, and can be differentiated like any function of torch.

        solve = Solver(model, loss, torch.optim.SGD, lr=0.1, method=Unrolled(steps=100))
        fitted = solve(batch, hparams)
        validation_loss(fitted).backward()

    `fitted` is the model with other parameters: the trained ones, which are functions of `hparams`
    and of the parameters that the model has now.  `backward` adds the hypergradient to `.grad` of
    hparams, and the meta-gradient of an initialization (MAML) to `.grad` of the model's own
    parameters.  The model itself is never changed; keep a result with
    ``model.load_state_dict(fitted.state_dict())``.

    Solvers nest: a loss may itself call another solver, for problems of more than two levels.

    Args:
        model: a module, or a tree of tensors; what requires grad is trained.
        loss: f, ``(model, batch, hparams) -> scalar``; without hparams ``(model, batch)``.
        optimizer: a class of `torch.optim` (see `from_torch`), an instance of one over the model's
            parameters, a rule of this package, or a TorchOpt transformation.
        options: of the class, such as ``lr=0.1``; ``momentum=Hyper("momentum")`` makes one a
            hyperparameter, ``hparams["momentum"]``.
        method: how the derivative is taken.  `Unrolled` has the number of steps itself; `Implicit`
            differentiates at the end of `steps` steps.
        steps: training steps of a method that has none itself.
        grad_norm: end this training where ‖∇f‖₂ is at most this.
        warm_start: start where the last call ended, with its optimizer state, instead of at the
            model's own parameters.

    Attributes:
        state: see `SolverState`; `state_dict` and `load_state_dict` store it.
        report: `Report` of the last call and of its backward pass.

    Raises:
        TypeError: loss is not callable, an optimizer or a method that is not supported.
        ValueError: nothing to train, a number of steps below 1, an optimizer hyperparameter that
            the method cannot differentiate.
    """

    def __init__(
        self,
        model: ModelT,
        loss: Callable[..., Tensor],
        optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer | Optimizer | Any,
        *,
        method: Unrolled | Implicit,
        steps: int | None = None,
        grad_norm: float | None = None,
        warm_start: bool = False,
        **options: Any,
    ) -> None:
        if not callable(loss):
            raise TypeError(
                "loss must be a function (model, batch, hparams) -> scalar tensor, but got "
                f"{loss!r}."
            )
        if isinstance(loss, TwoViewLoss):
            raise TypeError(
                "loss is a TwoViewLoss, which takes trees; use Problem and an estimator."
            )
        self.model = model
        self.loss = loss
        self.warm_start = warm_start
        self.optimizer = update_rule(optimizer, options, self._params())
        trainable_leaves(self._params())
        self.steps = check_method(method, steps, grad_norm, self.optimizer)
        self.method = method
        if isinstance(method, Unrolled):
            self.method = replace(method, optimizer=self.optimizer)
        self.grad_norm = grad_norm
        self.report: Report | None = None
        self._made: tuple[tuple[nn.Module, ...], tuple[str, ...], Problem] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget where the last call ended."""
        self.state: SolverState = {
            "params": None,
            "optimizer": None,
            "implicit": {"adjoint": None, "solver": None},
        }

    def state_dict(self) -> SolverState:
        """Return the state, for `torch.save` (and ``weights_only=True``)."""
        return _copied(self.state)

    def load_state_dict(self, state: SolverState) -> None:
        """Go on from the state of an equal solver.

        Raises:
            ValueError: it has other entries.
        """
        if set(state) != set(self.state):
            raise ValueError(
                f"state must have the entries {sorted(self.state)}, but got {sorted(state)}."
            )
        self.state = _copied(state)

    def __call__(self, batch: Any, hparams: Any = None) -> ModelT:
        """Train, and return the model at the trained parameters.

        Under `torch.no_grad` this is plain training.

        Args:
            batch: second argument of the loss.  With `Unrolled`, a callable t -> batch gives
                another one at each step.
            hparams: third argument of the loss: a tensor, a tree of tensors, or a module.

        Raises:
            TypeError: a hyperparameter is not a floating tensor.
            ValueError: a hyperparameter does not require grad.
            FloatingPointError: a loss, gradient or parameter is not finite; names step and tensor.
        """
        params, start = self._start()
        hyper, given, module = _hyper(hparams)
        if not given and torch.is_grad_enabled() and not _NESTED.get():
            self._check_start()
        run = self._run(self._problem(module), params, hyper, batch)
        if torch.is_grad_enabled():
            end = solution(run, start, given)
        else:
            end = descend(run, self.steps, self.grad_norm)
        self.report = run.report
        if self.warm_start:
            self.state["params"] = [t.detach() for t in end]
            self.state["optimizer"] = run.optimizer_state
        fitted = params.rebuild(end)
        if isinstance(self.model, nn.Module):
            return cast(ModelT, view(self.model, fitted))
        return cast(ModelT, fitted)

    def _params(self) -> Tree:
        """Return the tree that is trained."""
        if isinstance(self.model, nn.Module):
            return dict(self.model.named_parameters())
        return self.model

    def _start(self) -> tuple[Leaves, list[Tensor]]:
        """Return leaves at w₀, and the tensors that they stand for."""
        tree = self._params()
        leaves = trainable_leaves(tree)
        distinct = {id(t): t for t in optree.tree_leaves(tree) if t.requires_grad}
        last = self.state["params"]
        if last is None:
            return leaves, list(distinct.values())
        shapes = [tuple(t.shape) for t in leaves.tensors]
        if [tuple(t.shape) for t in last] != shapes:
            raise ValueError(
                f"state['params'] has shapes {[tuple(t.shape) for t in last]}, but the trained "
                f"parameters {leaves.names} have {shapes}; call reset() for another model."
            )
        return replace(leaves, tensors=[t.detach().requires_grad_() for t in last]), last

    def _check_start(self) -> None:
        """Raise ValueError unless the solution depends on the model's parameters."""
        reason = None
        if self.warm_start:
            reason = "warm_start=True starts elsewhere"
        elif isinstance(self.method, Implicit):
            reason = "a minimum does not depend on where training started"
        elif self.method.memory == "forward":
            reason = "memory='forward' carries derivatives in hparams only"
        if reason:
            raise ValueError(
                f"without hparams only the start could get a gradient, but {reason}; pass hparams."
            )

    def _problem(self, hyper_module: nn.Module | None) -> Problem:
        """Return the losses over trees: the same object, for compiled programs, where it fits."""
        modules = [m for m in (self.model, hyper_module) if isinstance(m, nn.Module)]
        parts = tuple(part for m in modules for part in m.modules())
        names = tuple(name for m in modules for name, _ in m.named_parameters())
        if self._made is None or self._made[:2] != (parts, names):
            problem = _problem(self.model, self.loss, hyper_module)
            self._made = parts, names, problem
        return self._made[2]

    def _run(self, problem: Problem, params: Leaves, hyper: Leaves, batch: Any) -> Run:
        state = self.state["optimizer"]
        level = (problem, params, hyper, self.optimizer, state, batch)
        if isinstance(self.method, Unrolled):
            kind = ForwardRun if self.method.memory == "forward" else UnrolledRun
            return kind(*level, method=self.method)
        if callable(batch):
            raise ValueError(
                "Implicit differentiates one loss, but batch is a function of the step; pass one "
                "batch, or use Unrolled."
            )
        return ImplicitRun(
            *level,
            method=self.method,
            steps=self.steps,
            grad_norm=self.grad_norm,
            state=self.state["implicit"],
        )


def _copied(state: SolverState) -> SolverState:
    return {**state, "implicit": state["implicit"].copy()}


_NESTED: ContextVar[bool] = ContextVar("nested", default=False)
"""Whether a loss is being evaluated: there, hyperparameters of levels above may be constants."""


@contextmanager
def _nested() -> Iterator[None]:
    token = _NESTED.set(True)
    try:
        yield
    finally:
        _NESTED.reset(token)


def _problem(model: Any, loss: Callable[..., Tensor], hyper_module: nn.Module | None) -> Problem:
    """Return a problem over trees; its outer loss is the linear function of `pairing`."""
    hyper = None if hyper_module is None else Swap(hyper_module)

    def evaluate(model: Any, hparams: Tree, batch: Any) -> Tensor:
        with _nested():
            if hparams is None:
                return loss(model, batch)
            if hyper is None:
                return loss(model, batch, hparams)
            return hyper.call(hparams, lambda module: loss(model, batch, module))

    if not isinstance(model, nn.Module):
        return Problem(evaluate, pairing)
    over_trees, _ = module_problem(model, evaluate, evaluate)
    return Problem(over_trees.inner_loss, pairing)


def _hyper(hparams: Any) -> tuple[Leaves, list[Tensor], nn.Module | None]:
    """Return leaves at h, the tensors that they stand for, and the module that holds them."""
    module = hparams if isinstance(hparams, nn.Module) else None
    tree: Tree = dict(module.named_parameters()) if module else hparams
    flat, spec = optree.tree_flatten(tree)
    names = leaf_names(tree, "hparams")
    check_tensors(flat, names)
    if torch.is_grad_enabled() and not _NESTED.get() and hparams is not None:
        free = {k: p for k, p in tree.items() if p.requires_grad} if module else tree
        hyper_leaves(free)  # checks them
    moving = torch.is_grad_enabled()
    index = [i for i, t in enumerate(flat) if moving and t.requires_grad]
    constant = [t.detach() for t in flat]

    def rebuild(values: Sequence[Tensor]) -> Tree:
        leaves = list(constant)
        for i, value in zip(index, values, strict=True):
            leaves[i] = value
        return optree.tree_unflatten(spec, leaves)

    given = [flat[i] for i in index]
    tensors = [t.detach().requires_grad_() for t in given]
    return Leaves(tensors, [names[i] for i in index], rebuild), given, module
