"""`ModuleInner`: the inner level made of a module, with one set of hyperparameters per example."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.checkpoint import copy
from bilevel.checks import integer
from bilevel.metrics import Cost, Metrics
from bilevel.self_tuning.convert import Converted, Names, convert
from bilevel.self_tuning.data import Data, Split, Stream, rows_of, warn_of_same_data
from bilevel.self_tuning.layout import Layout
from bilevel.self_tuning.loader import HyperSource
from bilevel.self_tuning.module_response import ModuleResponse
from bilevel.self_tuning.objective import (
    Functions,
    Loss,
    Measure,
    Objective,
    OuterLoss,
    Penalty,
    Predict,
    forward,
)
from bilevel.self_tuning.response import ResponseModel
from bilevel.space import Space
from hypergrad import SGD, Problem
from hypergrad.optimizers import Optimizer, State
from hypergrad.optimizers.flat import flatten, unflatten
from hypergrad.optimizers.values import constants
from hypergrad.training import is_finite
from hypergrad.tree import same_structure, trainable_leaves, zeros_for_none

__all__ = ["ModuleInner"]

EVALUATION_ROWS = 1024
"""Most rows in one forward pass of an evaluation."""

KEPT = 32
"""Most batches that BatchNorm statistics are moved by when weights are adopted."""


class ModuleInner:
    """An `Inner` that trains a module, whose losses see hyperparameters example by example.

    The four functions get `values`, all active hyperparameters by name: tensors of shape
    (rows, *shape) where the gradient owns them, one entry per example of the batch (equal in
    plain training), but (*shape) for `per_batch` names.  So

        predict(module, values, batch) -> outputs        augments the batch, calls the module
        loss(outputs, values, batch) -> (rows,) or ()    L_T of each example, or its mean
        penalty(module, values) -> (rows,) or ()         regularizer of the weights, added to L_T
        outer_loss(outputs, batch) -> (rows,) or ()      L_V, which has no hyperparameters

    `predict` is called in training mode for L_T and in evaluation mode for L_V; there it must not
    augment (see ``module.training``).  Outputs are a tensor or a tree of tensors.  Random draws
    are seeded by the batch number, so the losses are pure.

    Every outer algorithm takes it; `SelfTuning` also makes its weights respond, see `convert`.

    Args:
        module: the network, copied; its parameters that require grad are trained.
        space: the hyperparameters; those that are active and gradient-owned are tuned.
        loss: see above.
        outer_loss: see above; also what `evaluate` reports.
        train: training data, see `Data`.
        val: validation data: tensors or a list of batches.
        test: test data, which no decision looks at: the loss on the data that λ was tuned on is
            optimistic.  None for none.
        predict: see above; by default ``module(batch["x"])``.
        penalty: see above.
        metrics: ``(outputs, batch) -> {name: (rows,) tensor}``, further numbers of `evaluate`.
        optimizer: update rule of the weights.
        hparams: initial values by name; defaults fill up.
        batch_size: rows of a training batch where `train` holds tensors.
        val_batch_size: rows of a validation batch where `val` holds tensors; None for all.
        per_batch: names with one perturbation per minibatch: what acts on shared weights.
        integers: names whose values are rounded.
        dropout: see `convert`.
        dropconnect: see `convert`.
        plain: see `convert`.
        perturbed: training data that was augmented at perturbed hyperparameters, see
            `AugmentedDataset`.  By default `train`.
        source: tells loader workers the current λ and σ.
        seed: of batches, masks and noise.

    Raises:
        ValueError: see `convert`, `Layout.of` and `Stream`; a value outside its domain, or on a
            bound.
    """

    def __init__(
        self,
        module: nn.Module,
        space: Space,
        *,
        loss: Loss,
        outer_loss: OuterLoss,
        train: Data,
        val: Split,
        test: Split | None = None,
        predict: Predict = forward,
        penalty: Penalty | None = None,
        metrics: Measure | None = None,
        optimizer: Optimizer | None = None,
        hparams: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        per_batch: Collection[str] = (),
        integers: Collection[str] = (),
        dropout: Names | None = None,
        dropconnect: Names | None = None,
        plain: Collection[str] = (),
        perturbed: Data | None = None,
        source: HyperSource | None = None,
        seed: int = 0,
    ) -> None:
        self._seed = integer("seed", seed, minimum=0)
        self._space = space
        first = next(module.parameters(), None)
        if first is None:
            raise ValueError(f"{type(module).__name__} has no parameters.")
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        values = space.validate(hparams or {}, dtype=dtype, device=first.device)
        owned = [name for name in space.grad if name in values]
        self.layout = Layout.of(space, owned, per_batch, integers)
        self._hparams = {name: values[name] for name in owned}
        constant = {n: v for n, v in values.items() if n not in self._hparams}
        self.converted: Converted = convert(
            module, self.layout, plain=plain, dropout=dropout, dropconnect=dropconnect
        )
        net = self.converted.module
        self.objective = Objective(
            Functions(predict, loss, outer_loss, penalty, metrics),
            self.converted,
            self.layout,
            constant,
            first.device,
        )
        self._trained = {n: p for n, p in sorted(net.named_parameters()) if p.requires_grad}
        if not self._trained:
            raise ValueError(f"{type(module).__name__}: no parameter requires grad.")
        self._leaves = trainable_leaves(dict(self._trained))
        self._flat = flatten(self._leaves.tensors).detach()
        self._optimizer = SGD(lr=0.01, momentum=0.9) if optimizer is None else optimizer
        self._optimizer_state: State = self._optimizer.init(self._flat)
        self._source = source
        self._streams = {
            "train": Stream("train", train, batch_size, self._seed),
            "val": Stream("val", val, val_batch_size, self._seed + 1),
        }
        if test is not None:
            self._streams["test"] = Stream("test", test, None, self._seed)
        if perturbed is not None:
            self._streams["perturbed"] = Stream("perturbed", perturbed, batch_size, self._seed)
        self._drawn = dict.fromkeys(self._streams, 0)
        self._moves = bool(self.objective.buffers())
        self._last: list[Any] = []
        warn_of_same_data(train, val)
        self.set_hparams({})

    # The inner level.

    @property
    def space(self) -> Space:
        """See `Inner.space`."""
        return self._space

    @property
    def problem(self) -> Problem:
        """See `Inner.problem`."""
        return Problem(self._inner_loss, self._outer_loss)

    @property
    def params(self) -> dict[str, Tensor]:
        """See `Inner.params`: the trained tensors by name."""
        named = self.named(self._flat)
        return {name: value.detach().requires_grad_() for name, value in named.items()}

    @property
    def optimizer(self) -> Optimizer:
        """See `Inner.optimizer`."""
        return self._optimizer

    @property
    def optimizer_state(self) -> State:
        """See `Inner.optimizer_state`."""
        return self._optimizer_state

    @property
    def hparams(self) -> dict[str, Tensor]:
        """See `Inner.hparams`; integers are not rounded here."""
        return dict(self._hparams)

    def set_hparams(self, values: Mapping[str, Tensor]) -> None:
        """See `Inner.set_hparams`.

        Raises:
            ValueError: unknown names or other shapes.
        """
        merged = {**self._hparams, **{name: value.detach() for name, value in values.items()}}
        same_structure(merged, self._hparams, "hparams", "the current hparams")
        self._hparams = {n: merged[n].to(v).clone() for n, v in self._hparams.items()}
        resolved = self._optimizer.resolve(self._hparams, self._leaves)
        self._rates = constants(resolved)

    def inner_batches(self, count: int) -> list[Any]:
        """See `Inner.inner_batches`: pairs of a batch and the seed of its random draws."""
        return [self.draw("train") for _ in range(count)]

    def outer_batch(self) -> Any:
        """See `Inner.outer_batch`."""
        return self.draw("val")

    def draw(self, split: str) -> tuple[Any, int]:
        """Return the next batch of a stream, and the seed of its random draws."""
        t = self._drawn[split]
        self._drawn[split] = t + 1
        salt = sum(map(ord, split))
        found = self._streams[split](t), (self._seed << 40) + (salt << 28) + t
        if split in ("train", "perturbed") and self._moves:
            self._last = [*self._last, found][-KEPT:]
        return found

    def step(self) -> Metrics:
        """See `Inner.step`."""
        ((batch, seed),) = self.inner_batches(1)
        views = [view.requires_grad_() for view in unflatten(self._flat, self._leaves.tensors)]
        params = dict(zip(self._trained, views, strict=True))
        expanded = self.objective.expanded(self._hparams, batch)
        loss = self.objective.training_loss(params, expanded, batch, seed, live=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the training loss is {value}")
        grads = torch.autograd.grad(loss, views, allow_unused=True)
        flat = flatten(zeros_for_none(grads, views))
        with torch.no_grad():
            after, state = self._optimizer.update(
                self._flat, flat, self._optimizer_state, self._rates
            )
        if not is_finite(after):
            raise FloatingPointError("the weights are not finite after a training step")
        self._flat, self._optimizer_state, self._last = after, state, []
        return Metrics({"loss": value}, cost=Cost(steps=1, gradients=1))

    def adopt(self, params: Mapping[str, Tensor], optimizer_state: State, steps: int) -> None:
        """See `Inner.adopt`; BatchNorm statistics are moved by the last training batches."""
        same_structure(dict(params), dict(self._trained), "params", "the current params")
        flat = flatten([params[name].detach() for name in self._trained])
        self._optimizer.check_state(optimizer_state, flat)
        self._flat, self._optimizer_state = flat, dict(optimizer_state)
        with torch.no_grad():
            for batch, seed in self._last[-steps:] if steps else []:
                values = self.objective.expanded(self._hparams, batch)
                self.objective.training_loss(self.params, values, batch, seed, live=True)
        self._last = []

    def evaluate(self, split: str) -> Metrics:
        """See `Inner.evaluate`: means over all rows of a split.

        Raises:
            ValueError: an unknown split, or an endless one.
        """
        if split not in self._streams:
            raise ValueError(f"split must be one of {list(self.splits)}, but got {split!r}.")
        totals: dict[str, float] = {}
        count = 0
        for batch in self._streams[split].whole(EVALUATION_ROWS):
            rows = rows_of(batch)
            found = self.objective.measure(self.params, batch)
            for name, each in found.items():
                totals[name] = totals.get(name, 0.0) + rows * float(each.double().mean())
            count += rows
        return Metrics({name: total / count for name, total in totals.items()})

    def state_dict(self) -> dict[str, Any]:
        """See `Inner.state_dict`."""
        return {
            "params": self._flat,
            "optimizer": self._optimizer_state,
            "hparams": dict(self._hparams),
            "buffers": {n: b.detach().clone() for n, b in self.objective.buffers().items()},
            "drawn": dict(self._drawn),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Inner.load_state_dict`.

        Raises:
            ValueError: the state is that of another network or of other hyperparameters.
        """
        saved = copy(dict(state))
        if saved["params"].shape != self._flat.shape:
            raise ValueError(
                f"saved params have {saved['params'].numel()} entries, but the network has "
                f"{self._flat.numel()}."
            )
        self._flat, self._optimizer_state = saved["params"].to(self._flat), saved["optimizer"]
        self.set_hparams(saved["hparams"])
        self._drawn, self._last = dict(saved["drawn"]), []
        with torch.no_grad():
            for name, buffer in self.objective.buffers().items():
                buffer.copy_(saved["buffers"][name])

    def export(self) -> nn.Module:
        """Return a plain module in evaluation mode, at the current weights and hyperparameters."""
        with torch.no_grad():
            for name, value in self.named(self._flat).items():
                self._trained[name].copy_(value)
        plain = self.converted.export().eval()
        values = {n: self.layout.round(n, v) for n, v in self._hparams.items()}
        for path, (name, index) in self.converted.rates().items():
            chosen = values[name] if index is None else values[name][index]
            target: Any = plain.get_submodule(path)
            setattr(target, "dropout" if hasattr(target, "dropout") else "p", float(chosen))
        return plain

    def response_model(self) -> ResponseModel:
        """See `Responsive`."""
        return ModuleResponse(self, self._source)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names that `evaluate` and `draw` know."""
        return tuple(self._streams)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of a flat vector by name."""
        return dict(zip(self._trained, unflatten(flat, self._leaves.tensors), strict=True))

    def _inner_loss(self, params: Any, hparams: Any, batch: Any) -> Tensor:
        data, seed = batch
        values = self.objective.expanded(hparams, data)
        return self.objective.training_loss(params, values, data, seed)

    def _outer_loss(self, params: Any, hparams: Any, batch: Any) -> Tensor:
        data, seed = batch
        return self.objective.outer_loss(params, data, seed)
