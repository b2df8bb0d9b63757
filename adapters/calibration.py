"""How far confidences can be trusted: calibration error, risk-coverage, and rescues by a blend."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["area_under_risk_coverage", "expected_calibration_error", "rescued"]


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Return Σ_b |B_b|/n · |accuracy(B_b) − confidence(B_b)| over bins (lo, hi] of confidence.

    Args:
        logits: shape (n, classes).
        labels: shape (n,).
        bins: of equal width.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    gap = (predicted == labels).double() - confidence
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add(0, which, gap)
    return float(sums.abs().sum() / len(labels))


def area_under_risk_coverage(logits: Tensor, labels: Tensor) -> float:
    """Return the mean error rate among the most confident i samples, over i = 1 ... n, in 1/1000.

    0 for a network that never errs; lower means that errors have low confidence.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).double()[confidence.argsort(descending=True, stable=True)]
    risk = wrong.cumsum(0) / torch.arange(1, len(wrong) + 1, device=wrong.device)
    return float(1000 * risk.mean())


def rescued(first: Tensor, second: Tensor, blended: Tensor, labels: Tensor) -> float:
    """Return the share of samples that two networks get wrong and their blend gets right.

    Lin et al., ICLR 2024 ("FalseFalseTrue"); at most the smaller of the two error rates.

    Args:
        first: outputs of one network, shape (n, classes).
        second: outputs of the other.
        blended: outputs of the average.
        labels: shape (n,).
    """
    hits = [outputs.argmax(dim=1) == labels for outputs in (first, second, blended)]
    return float((~hits[0] & ~hits[1] & hits[2]).double().mean())
