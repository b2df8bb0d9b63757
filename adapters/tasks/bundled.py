"""Real data sets that scikit-learn carries inside, so that nothing is downloaded."""

from __future__ import annotations

from adapters.tasks.make import classification
from adapters.tasks.task import Classification

__all__ = ["breast_cancer", "digits"]


def digits(
    noise: float = 0.0, seed: int = 0, n_train: int = 600, n_val: int = 400
) -> Classification:
    """8×8 gray images of handwritten digits in 10 classes (1797 samples, UCI).

    Pixels are divided by 16, so they lie in [0, 1]; inputs have shape (1, 8, 8).
    See `adapters.tasks.make.classification` for the arguments and errors.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    return classification(
        "digits",
        data.images[:, None] / 16.0,
        data.target,
        noise=noise,
        seed=seed,
        n_train=n_train,
        n_val=n_val,
        standardize=False,
    )


def breast_cancer(
    noise: float = 0.0, seed: int = 0, n_train: int = 240, n_val: int = 140
) -> Classification:
    """30 measurements of cell nuclei, malignant or benign (569 samples, Wisconsin Diagnostic).

    Features are standardized by the training samples; inputs have shape (30,).
    See `adapters.tasks.make.classification` for the arguments and errors.
    """
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    return classification(
        "breast_cancer",
        data.data,
        data.target,
        noise=noise,
        seed=seed,
        n_train=n_train,
        n_val=n_val,
        standardize=True,
    )
