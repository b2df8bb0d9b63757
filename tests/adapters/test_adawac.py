"""The learner `adawac` on masks: it learns, resumes, and is tuned; repeated and wrong tasks."""

from __future__ import annotations

import pytest
import torch

from adapters import Trainer, registry, tasks
from adapters.networks import UNet
from adapters.tasks import Segmentation
from bilevel import Descent, Grad, SelfTuning, tune
from hypergrad import Unrolled, check_hypergradient


def masks(rows: int = 24, dtype: torch.dtype = torch.float32) -> Segmentation:
    """Bright blocks on noise; the second half of the images has an empty mask."""
    generator = torch.Generator().manual_seed(0)
    x = 0.2 * torch.rand(rows, 1, 8, 8, generator=generator)
    y = torch.zeros(rows, 8, 8)
    for i in range(rows // 2):
        top, left = torch.randint(5, (2,), generator=generator).tolist()
        y[i, top : top + 4, left : left + 4] = 1
    split = {"x": x + 0.7 * y[:, None], "y": y}
    return Segmentation("blocks", {"train": split, "val": split, "test": split}).to(dtype)


def set_up(task: Segmentation, space: object = None, **hparams: float) -> Trainer:
    learner = registry.get("adawac")(space)  # type: ignore[arg-type]
    assert isinstance(learner, Trainer)
    learner.setup(task, {"burn_in": 0, **hparams}, seed=0)
    return learner


def test_it_learns_masks_and_resumes() -> None:
    learner = set_up(masks())
    before = learner.evaluate("test")
    for _ in range(40):
        learner.step()
    after = learner.evaluate("test")
    assert after["loss"] < 0.7 * before["loss"]
    logits = learner.method.memory["logits"]
    assert logits[:12].mean() > logits[12:].mean()
    again = set_up(masks())
    again.load_state_dict(learner.state_dict())
    assert [dict(learner.step()) for _ in range(3)] == [dict(again.step()) for _ in range(3)]
    with pytest.raises(ValueError, match="task"):
        set_up(masks(26)).load_state_dict(learner.state_dict())


@pytest.mark.slow
def test_every_smooth_hyperparameter_on_masks_against_differences() -> None:
    space = registry.get("adawac").space
    smooth = [n for n, domain in space.items() if isinstance(domain, Grad)]
    learner = set_up(masks(dtype=torch.float64), space.own(**dict.fromkeys(smooth, "grad")))
    learner.step()
    report = check_hypergradient(
        Unrolled(learner.optimizer, steps=2),
        learner.problem,
        learner.params,
        learner.hparams,
        learner.inner_batches(2).__getitem__,
        learner.outer_batch(),
        tol=1e-5,
    )
    assert {row.name for row in report.rows} >= {f"hparams[{name!r}]" for name in smooth}
    assert report.passed, str(report)


@pytest.mark.parametrize("algorithm", [Descent(Unrolled(steps=3)), SelfTuning()], ids=type)
def test_outer_algorithms_tune_the_scale_on_masks(algorithm: object) -> None:
    space = registry.get("adawac").space
    others = [n for n in space.grad if n != "consistency"]
    learner = set_up(masks(), space.own(consistency="grad", **dict.fromkeys(others, "fixed")))
    before = learner.hparams["consistency"].detach().clone()
    result = tune(learner, algorithm, 12)  # type: ignore[arg-type]
    assert torch.isfinite(result.hparams["consistency"]).all()
    assert not torch.equal(torch.as_tensor(result.schedule["consistency"][-1]).to(before), before)


def test_a_repeated_index_takes_both_steps() -> None:
    learner = set_up(masks(), weight_step=0.5)
    batch = learner.inner_batches(1)[0]
    twice = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    method, model = learner.method, learner.module()
    values = {**method.setting.constants, **learner.hparams, "noise": 0.0, "clamp": 12.0}
    supervised, consistency = method._losses(model, values, twice)  # type: ignore[attr-defined]
    found = method.detached(model, values, twice)["logits"]
    rows = len(batch["index"])
    steps = (0.5 * (supervised - consistency)).reshape(2, rows).sum(dim=0)
    assert torch.allclose(found[:rows], steps, atol=1e-5)
    assert torch.equal(found[:rows], found[rows:])


def test_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="Classification or Segmentation"):
        registry.get("adawac")().setup(tasks.get("diabetes"), {}, seed=0)
    with pytest.raises(ValueError, match="multiples of 4"):
        UNet((1, 10, 8))
    with pytest.raises(ValueError, match="channels, height, width"):
        UNet((8,))
    assert UNet((3, 8, 16), 5)(torch.randn(2, 3, 8, 16)).shape == (2, 5, 8, 16)
