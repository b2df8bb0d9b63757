"""Nested optimization: hyperparameter spaces with owners, and tuning during training.

The public names and their modules are in ``__init__.pyi``; each module is imported at first
use, so that ``import bilevel`` loads neither torch nor Optuna nor Ray.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
