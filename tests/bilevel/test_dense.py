"""Dense prediction: losses of single images, empty masks, and views that are turned back."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from bilevel.adawac import SaddleWeights
from bilevel.dense import Turns, disagreement, has_foreground, pixel_losses

D = torch.float64


def test_pixel_losses_are_means_over_labeled_pixels() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 5, 6, dtype=D), torch.randint(4, (3, 5, 6))
    labels[1, 2:] = -100
    expected = [F.cross_entropy(a[None], b[None]) for a, b in zip(logits, labels, strict=True)]
    assert torch.allclose(pixel_losses(logits, labels), torch.stack(expected))

    one, mask = logits[:, :1], (labels % 2).to(D)
    mask[1, 2:] = -100
    each = F.binary_cross_entropy_with_logits(one[1, 0, :2], mask[1, :2])
    found = pixel_losses(one, mask)
    assert torch.allclose(found[1], each)
    assert torch.equal(found, pixel_losses(one[:, 0], mask))


@pytest.mark.parametrize("floating", [False, True])
def test_an_image_without_labeled_pixels_goes_to_the_consistency_loss(floating: bool) -> None:
    logits = torch.randn(2, 1 if floating else 3, 4, 4, requires_grad=True)
    labels = torch.zeros(2, 4, 4) if floating else torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[0] = -100
    losses = pixel_losses(logits, labels)
    assert float(losses[0].detach()) == 0.0 < float(losses[1].detach())
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert not grad[0].any()
    assert grad.isfinite().all()
    weights = SaddleWeights(2)
    weights(torch.arange(2), losses.detach(), torch.tensor([0.3, 0.0]))
    assert float(weights.beta()[0]) < 0.5 < float(weights.beta()[1])
    assert has_foreground(labels).tolist() == [False, False]
    labels[1, 0, 0] = 1
    assert has_foreground(labels).tolist() == [False, True]


@pytest.mark.parametrize("square", [True, False])
def test_turns_are_undone_and_commute_with_pooling(square: bool) -> None:
    x = torch.randn(40, 2, 8, 8 if square else 4)
    turns = Turns.draw(40, torch.Generator().manual_seed(0), square=square)
    assert torch.equal(turns.undo(turns(x)), x)
    pooled = F.avg_pool2d(x, 2)
    assert torch.allclose(turns.undo(F.avg_pool2d(turns(x), 2)), pooled, atol=1e-6)
    seen = {(int(q), bool(m)) for q, m in zip(turns.quarters, turns.mirrored, strict=True)}
    assert len(seen) == (8 if square else 4)
    for i in range(40):
        alone = x[i].flip(-1) if turns.mirrored[i] else x[i]
        assert torch.equal(turns(x)[i], torch.rot90(alone, int(turns.quarters[i]), (-2, -1)))


def test_disagreement_is_per_sample() -> None:
    z = torch.randn(3, 2, 4, 4, dtype=D)
    assert torch.allclose(disagreement(z, 3 * z), torch.zeros(3, dtype=D), atol=1e-12)
    assert torch.allclose(disagreement(z, -z), torch.full((3,), 2.0, dtype=D))
    other = z.clone()
    other[1] += 0.5
    assert disagreement(z, other, "square").tolist() == pytest.approx([0.0, 0.25, 0.0])


def test_bad_input() -> None:
    x = torch.randn(2, 3, 4, 6)
    with pytest.raises(ValueError, match="logits must have shape"):
        pixel_losses(x, torch.zeros(2, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits must have shape"):
        pixel_losses(x, torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match="one and other"):
        disagreement(x, x[:1])
    with pytest.raises(ValueError, match="kind must be"):
        disagreement(x, x, "euclid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="square=False"):
        Turns(torch.tensor([1, 0]), torch.zeros(2, dtype=torch.bool))(x)
    with pytest.raises(ValueError, match="maps must have shape"):
        Turns.draw(3, torch.Generator())(x)
