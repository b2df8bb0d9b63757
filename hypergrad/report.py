"""What `check_hypergradient` found, as numbers and as a table for a person."""

from __future__ import annotations

from dataclasses import dataclass

from hypergrad.status import Status

__all__ = ["Comparison", "HypergradientReport"]


@dataclass(frozen=True)
class Comparison:
    """One directional derivative of the outer loss, twice.

    Attributes:
        name: the leaf of hparams that was moved, or "all, direction k".
        estimate: ⟨dF/dh, d⟩ by the estimator.
        difference: the same by central differences.
        error: |estimate − difference| / max(|estimate|, |difference|).
        noise: disagreement of the differences at two step sizes and their rounding, relative
            like `error`.
    """

    name: str
    estimate: float
    difference: float
    error: float
    noise: float


@dataclass(frozen=True)
class HypergradientReport:
    """Result of `check_hypergradient`; print it.

    Attributes:
        estimator: its repr.
        rows: the comparisons.
        tol: largest relative error that passes, beyond the noise floor.
        status: of the checked hypergradient.
        deterministic: whether two evaluations at the same h gave the same outer loss.
        inner_gradient: ‖∇_w f‖ where an implicit estimator was called; None for unrolled ones.
    """

    estimator: str
    rows: tuple[Comparison, ...]
    tol: float
    status: Status
    deterministic: bool
    inner_gradient: float | None

    def row_passed(self, row: Comparison) -> bool:
        """Whether a comparison is within tolerance and noise floor."""
        return row.error <= self.tol + row.noise

    @property
    def conclusive(self) -> bool:
        """Whether the largest difference has two digits above its noise floor.

        Where it has not, the outer loss is not smooth in h at the scale of `eps`, and agreement
        within the noise says nothing.
        """
        return max(self.rows, key=lambda row: abs(row.difference)).noise <= 1e-2

    @property
    def passed(self) -> bool:
        """Whether all comparisons are within tolerance, for a deterministic smooth loss."""
        agree = all(self.row_passed(row) for row in self.rows)
        return self.deterministic and self.conclusive and agree

    @property
    def worst(self) -> Comparison:
        """The comparison with the largest error beyond its noise."""
        return max(self.rows, key=lambda row: row.error - row.noise)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        head = f"{'hyperparameter':<{max(width, 14)}}  {'estimate':>13}  {'difference':>13}"
        lines = [self.estimator, f"{head}  {'error':>8}  {'noise':>8}"]
        for row in self.rows:
            verdict = "ok" if self.row_passed(row) else "WRONG"
            lines.append(
                f"{row.name:<{max(width, 14)}}  {row.estimate:>13.6e}  {row.difference:>13.6e}"
                f"  {row.error:>8.1e}  {row.noise:>8.1e}  {verdict}"
            )
        lines.append(f"status {self.status}")
        if self.inner_gradient is not None:
            advice = "" if self.inner_gradient < 1e-7 else ": not solved; pass solve="
            lines.append(f"inner gradient norm {self.inner_gradient:.1e} at w*{advice}")
        if not self.deterministic:
            lines.append(
                "the outer loss differs between two evaluations at the same hyperparameters: "
                "draw random numbers from a seed in the batch"
            )
        if not self.conclusive:
            lines.append(
                "the differences are mostly noise: the loss has jumps or the gradient is zero; "
                "freeze discrete choices, or pass another eps="
            )
        worst = self.worst
        verdict = "passed" if self.passed else "FAILED"
        lines.append(
            f"{verdict}: worst error {worst.error:.1e} in {worst.name}, tol {self.tol:.1e}"
        )
        return "\n".join(lines)
