"""BOAT (boat-torch 1.1.1): its Problem, configured as its examples are."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.hypergrad.library import Library, Method
from benchmarks.hypergrad.problems import Stationary, Training

__all__ = ["LIBRARY", "lower", "upper"]


def lower(feed: Any, hyper: Any, model: Any, params: Any = None) -> Tensor:
    """Inner loss as BOAT calls it."""
    problem, batch = feed["problem"], next(feed["batches"])
    named = dict(model.named_parameters())
    if params is not None:
        named = dict(zip(named, params, strict=True))
    hparams = dict(zip(problem.hparams, hyper.hparams, strict=True))
    return problem.inner_loss(_forward(model, params), named, hparams, batch)  # type: ignore[no-any-return]


def upper(feed: Any, hyper: Any, model: Any, params: Any = None) -> Tensor:
    """Outer loss as BOAT calls it."""
    return feed["problem"].outer_loss(_forward(model, params))  # type: ignore[no-any-return]


def _forward(model: Any, params: Any) -> Any:
    return model if params is None else lambda x: model(x, params=params)


class _Hyperparameters(nn.Module):
    def __init__(self, problem: Training | Stationary) -> None:
        super().__init__()
        self.hparams = nn.ParameterList(v.clone() for v in problem.hparams.values())


def _methods(problem: Training | Stationary) -> list[Method]:
    if isinstance(problem, Training):
        steps = len(problem.batches)
        return [Method("RAD", _run(problem, "RAD", problem.batches, problem.rule.torch, steps))]

    def still(module: nn.Module) -> torch.optim.Optimizer:
        """One step of length 0 (BOAT must take one); CG goes by the default of 1."""
        return torch.optim.SGD([{"params": list(module.parameters()), "lr": 0.0}], lr=1.0)

    return [Method("CG", _run(problem, "CG", [problem.batch], still, 1))]


def _run(problem: Any, operation: str, batches: Any, optimizer: Any, steps: int) -> Any:
    from boat_torch.boat_opt import Problem

    name = __name__

    def run() -> Sequence[Tensor]:
        module, hyper = deepcopy(problem.module), _Hyperparameters(problem)
        config = {
            "fo_op": None,
            "gm_op": ["NGD"],
            "na_op": [operation],
            "lower_level_model": module,
            "upper_level_model": hyper,
            "lower_level_var": list(module.parameters()),
            "upper_level_var": list(hyper.parameters()),
            "lower_level_opt": optimizer(module),
            "upper_level_opt": torch.optim.SGD(hyper.parameters(), lr=0.1),
            "lower_iters": steps,
            "device": "cpu",
            "loss_log_path": os.devnull,
            "accumulate_grad": False,
            "copy_last_param": False,
            "return_grad": True,
            "CG": {"tolerance": 0.0, "k": getattr(problem, "iterations", 0)},
            "GDA": {"alpha_init": 0.0, "alpha_decay": 0.0},
            "RGT": {"truncate_iter": 0},
        }
        losses = {
            "lower_level_loss": {"function": f"{name}.lower"},
            "upper_level_loss": {"function": f"{name}.upper"},
        }
        solver = Problem(config, losses)
        solver.build_ll_solver()
        solver.build_ul_solver()
        solver.set_track_trajectory(True)
        feed = {"problem": problem, "batches": itertools.cycle(batches)}
        grads, _ = solver.run_iter(feed, feed, current_iter=0)
        return grads  # type: ignore[no-any-return]

    return run


LIBRARY = Library(
    "boat", "BOAT 1.1.1", ("boat_torch",), _methods, requirements=("boat-torch==1.1.1",)
)
