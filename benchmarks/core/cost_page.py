"""Text of the page of costs."""

# ruff: noqa: E501

from __future__ import annotations

__all__ = ["PAGE", "ROWS"]

ROWS = {
    "plain": "plain",
    "compander, fixed": "compander, a and b fixed",
    "compander, training loss": "compander, a and b on the training loss",
    "compander, first order each step": "compander, first-order step on the validation loss each step",
    "compander, one step each step": "compander, one-step hypergradient each step",
    "compander, unrolled": "compander, unrolled, graphs kept",
    "compander, unrolled, replayed": "compander, unrolled, replayed",
    "two views": "supervised loss and consistency of two views",
    "AdaWAC": "the same with AdaWAC's weights",
    "reweighting, uniform": "reweighting, uniform",
    "reweighting, linupper": "reweighting, linupper",
    "reweighting, upper": "reweighting, upper",
    "reweighting, quadratic": "reweighting, quadratic",
    "reweighting, extremes": "reweighting, extremes",
    "learned weights, one step each step": "learned weights, one-step hypergradient each step",
    "learned weights, unrolled": "learned weights, unrolled, graphs kept",
    "learned weights, unrolled, replayed": "learned weights, unrolled, replayed",
    "LoRA": "LoRA of rank 2 on every layer",
    "DiffoRA, first_order": "DiffoRA over it, first order",
    "DiffoRA, finite_difference": "DiffoRA over it, finite difference",
    "DiffoRA, score": "DiffoRA over it, score",
    "EMA, fixed": "balanced average, fixed coefficient",
    "EMA, polynomial": "balanced average, polynomial coefficient",
    "EMA, derived, global": "balanced average, derived, one coefficient",
    "EMA, derived, layer": "balanced average, derived, one of each layer",
    "EMA, derived, tensor": "balanced average, derived, one of each tensor",
}
"""Method -> its title, in the order of the table."""

PAGE = """# Cost of the core methods

Command: `{command}`.
torch {torch}, float32. {text}

Conv net: three 3×3 convolutions 16-32-64 on 28×28 images and a linear layer. Transformer: two blocks of width 64 with 4 heads
on 64 tokens. A plain step takes: {plain}. Unrolled hypergradients look through {steps} steps; their time is per training step.
DiffoRA's is per step of the adapters, with a step on the gates at each.

{table}

What bounds it:

- Compander: one elementwise function of the weights per step, and its derivative, whatever the batch: most where the weights are
  many and the batch is small. First order adds a forward and a backward pass on validation data. One-step and unrolled
  hypergradients are bound by double backward: a product with the Hessian takes several gradients. Kept graphs hold all
  steps at once, replayed ones a single one.
- AdaWAC: the second view of the consistency loss is nearly all of it; the weights themselves add a few per cent.
- Reweighting: a few operations on one number a sample. Learned weights cost the unrolling.
- DiffoRA: a second forward and backward pass for the gates; by finite differences four more. LoRA spares only gradients of
  frozen weights, and the gates are scalars.
- Balanced averages: passes over the parameters, and a copy of gradients and parameters (state 2.5 times the plain one with
  momentum), small against what backward keeps at this batch size.
"""
