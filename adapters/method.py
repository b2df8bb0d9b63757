"""A training method: only what differs from plain training, as hooks that the trainer calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn

from adapters.networks import MLP
from adapters.tasks import Classification, Split, Task
from bilevel.metrics import Role
from bilevel.space import Space
from hypergrad.optimizers import SGD, Optimizer, Value

__all__ = ["Method", "Setting", "State", "every", "keep"]

Batch = Mapping[str, Any]
"""Rows of every tensor of the split ("x", "y", ...), and "index", "seed", "step", "phase"."""

Hook = TypeVar("Hook", bound=Callable[..., None])


@dataclass(frozen=True)
class Setting:
    """What a method runs on; fixed for the whole run.

    Attributes:
        task: data and splits.
        constants: value of every active hyperparameter that the gradient does not own.
        initial: first value of those that it owns, as given, before `Method.shapes`.
        artifacts: the frozen things named in `Method.needs`; copies of the method's own.
        seed: of the run.
    """

    task: Task
    constants: Mapping[str, Any]
    initial: Mapping[str, Any]
    artifacts: Mapping[str, Any]
    seed: int


@dataclass
class State:
    """What moves during training; hooks may change it in place, under `torch.no_grad`.

    Attributes:
        model: the network; its frozen parameters and its buffers are live.
        params: trained tensors by name, views of one flat vector; edit them in place.
        grads: gradient that the last step used, by name.  After weights that an estimator trained
            it is that of the last batch at the new weights for methods with `uses_grads`, and
            None for others.
        optimizer: state of the optimizer, vectors like the flat vector.
        hparams: current value of every active hyperparameter.
        step: steps done.
        phase: current phase.
    """

    model: nn.Module
    params: dict[str, Tensor]
    grads: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    hparams: Mapping[str, Any]
    step: int
    phase: str


def every(interval: int | str) -> Callable[[Hook], Hook]:
    """Decorate a method ``hook(self, state)``: called after each `interval`-th step.

    Args:
        interval: a number of steps, or the name of the integer hyperparameter that holds it.
    """

    def decorate(hook: Hook) -> Hook:
        hook.__dict__["interval"] = interval
        return hook

    return decorate


def keep(batch: Batch, **tensors: Tensor) -> None:
    """Keep tensors of a loss for `Method.after_batch`; does nothing outside a training step.

    This spares a method that remembers what it has computed, such as predictions, a second pass.
    """
    if "kept" in batch:
        batch["kept"].update({name: value.detach() for name, value in tensors.items()})


class Method:
    """Supervised training by gradient steps; subclasses override only what differs.

    A complete method is a docstring, a name, a space and a loss::

        class Focal(Method):
            '''Focal loss: easy samples weigh less (Lin et al., ICCV 2017, equation 4).'''

            name = "focal"
            space = Space(
                lr=Float(1e-3, 1.0, log=True, default=0.1),
                gamma=Grad(1.0, low=0.0, high=5.0, doc="focusing exponent"),
            )

            def loss(self, model, hparams, batch):
                log_p = -cross_entropy(model(batch["x"]), batch["y"], reduction="none")
                return -((1 - log_p.exp()) ** hparams["gamma"] * log_p).mean()

    `loss`, `penalty`, `detached`, `predict`, `measure` and `outer_loss` are pure: they change
    nothing and read only their arguments, `memory` and constants.  The default random generators
    are seeded from the batch around them.  So every estimator can differentiate through training.
    `hparams` holds all active hyperparameters: tensors where the gradient owns them, plain
    values elsewhere.

    Attributes:
        name: the registry name.
        space: every hyperparameter.  A `Grad` promises that the losses or the optimizer are
            differentiable in it almost everywhere, whoever owns it.
        needs: frozen artifacts, see `adapters.artifacts`.
        phases: names of the phases in order.
        scopes: name of a hyperparameter -> the first phase that it changes, for those that
            do not act from the start.  A finished earlier phase can then be used again.  The
            gradient can own only what reaches the losses of the phase that is tuned.
        shuffle: whether each epoch draws the samples in a new order; otherwise they come in the
            order of `pool`.
        uses_grads: whether hooks read `State.grads`.
        task_type: what kind of task it takes.
        roles: roles of metrics that are not plain values.
        setting: what the method runs on; there from `network` on.
        trained: names of the tensors that the current phase trains; there in losses and hooks.
            Inside a loss `requires_grad` does not tell: other tensors stand in for the network's.
        memory: tensors and plain data that hooks keep between steps; part of the run's state.
    """

    name: ClassVar[str]
    space: ClassVar[Space]
    needs: ClassVar[tuple[str, ...]] = ()
    phases: ClassVar[tuple[str, ...]] = ("train",)
    scopes: ClassVar[Mapping[str, str]] = {}
    shuffle: ClassVar[bool] = True
    uses_grads: ClassVar[bool] = False
    task_type: ClassVar[type[Task]] = Classification
    roles: ClassVar[Mapping[str, Role]] = {}

    setting: Setting
    trained: frozenset[str]
    memory: dict[str, Any]

    # Before training.  Random draws from torch's default generator are seeded by the run.

    def network(self) -> nn.Module:
        """Build the network; by default an `MLP` with two hidden layers of 64 units."""
        task = cast(Classification, self.setting.task)
        return MLP(task.input_shape, task.n_classes)

    def attach(self, model: nn.Module) -> None:
        """Change the network once: reparametrize, mask, freeze, initialize; fill `memory`.

        Parameters that require grad afterwards are trained.
        """

    def shapes(self, model: nn.Module) -> Mapping[str, tuple[int, ...]]:
        """Shapes of gradient-owned hyperparameters that depend on the network.

        The space declares them as numbers; where the gradient owns them each becomes a tensor of
        this shape, filled with that number.  Elsewhere they stay one number for all elements.
        """
        return {}

    def idle(self) -> Collection[str]:
        """Names that do nothing on this task; nobody owns them in this run."""
        return ()

    def optimizer(self, hyper: Callable[[str], Value]) -> Optimizer:
        """Return the update rule; by default SGD with momentum 0.9 and the space's "lr".

        Args:
            hyper: name -> what to pass to an `Optimizer` field: a `Hyper` where the gradient
                owns the hyperparameter, its value elsewhere.
        """
        return SGD(lr=hyper("lr"), momentum=0.9)

    # In each step.

    def pool(self, phase: str) -> Split:
        """Return the samples that a phase trains on; by default the training split."""
        return self.setting.task.split("train")

    def batch_size(self, hparams: Mapping[str, Any]) -> int:
        """Return the size of the next training batch; by default 64."""
        return 64

    def set_mode(self, model: nn.Module, training: bool) -> None:
        """Switch between training and evaluation, for methods that keep some layers in one."""
        model.train(training)

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return the training loss of a batch, a scalar; by default the mean of "loss"."""
        return self.measure(model, hparams, batch)["loss"].mean()

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor | None:
        """Return a regularizer that is added to the training loss; none by default."""
        return None

    def detached(
        self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch
    ) -> dict[str, Tensor]:
        """Return quantities that enter `loss` (as entries of its batch) without a gradient.

        `Tensor.detach` inside a loss makes hypergradients wrong; quantities computed here
        instead have no gradient in training and their full derivative in a hypergradient, see
        `hypergrad.two_view_grad`.
        """
        return {}

    def after_backward(
        self, grads: dict[str, Tensor], params: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return edited gradients by name; pure and differentiable, so it is part of the update.

        A hyperparameter that scales gradients and is to be tuned belongs to an `Optimizer`.
        """
        return grads

    def after_batch(self, batch: Batch) -> Mapping[str, float]:
        """Note what a training step has seen, in `memory`; return more metrics of the step.

        Called after each step with its batch, whose "kept" holds what `loss` gave to `keep`.  A
        hypergradient that looks through several steps holds `memory` constant.
        """
        return {}

    def after_step(self, state: State) -> None:
        """Do something after each step; see also `every`.

        What happens here is not seen by a hypergradient that looks through several steps; put
        a projection that must be into an `Optimizer`.
        """

    # Phases.

    def begin(self, phase: str, state: State) -> None:
        """Prepare a later phase: set `requires_grad` of parameters, change the network.

        The network holds the trained values here; what requires grad afterwards is trained, by
        a fresh optimizer.  Deterministic given `memory`, as it is called again on resume.
        """

    def done(self, state: State) -> bool:
        """Whether the current phase ends with this step; not asked about the last phase."""
        return False

    # Looking at the network.

    def predict(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return the outputs that are scored."""
        return cast(Tensor, model(batch["x"]))

    def measure(
        self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch
    ) -> dict[str, Tensor]:
        """Return metrics of each sample, "loss" among them; the task's by default."""
        task = cast(Classification, self.setting.task)
        return task.measure(self.predict(model, hparams, batch), batch)

    def outer_loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return the loss that hyperparameters minimize, on validation data in evaluation mode."""
        return self.measure(model, hparams, batch)["loss"].mean()

    def finish(self, model: nn.Module, hparams: Mapping[str, Any]) -> nn.Module:
        """Turn a trained copy of the network into a plain module: merge, prune, fold."""
        return model
