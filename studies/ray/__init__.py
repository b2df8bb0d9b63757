"""Ray Tune sweeps of learners: a trainable, a searcher, a `Tuner` with settings that hold.

The public names and their modules are in ``__init__.pyi``; each is imported at first use.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
