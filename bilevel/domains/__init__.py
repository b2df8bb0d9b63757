"""Domains: what one hyperparameter may be, what it is by default, and who owns it at first.

Frozen, hashable dataclasses; bad arguments are refused at construction, before any trial.
"""

from bilevel.domains.base import Domain
from bilevel.domains.discrete import Choice, Fixed, Switch
from bilevel.domains.grad import Grad
from bilevel.domains.numeric import Float, Int

__all__ = ["Choice", "Domain", "Fixed", "Float", "Grad", "Int", "Switch"]
