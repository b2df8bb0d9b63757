"""Estimators as compiled graphs: traced by make_fx, compiled by inductor, checked against eager.

A compiled call returns what the eager call returns, up to rounding, or it is the eager call and
its `CompileReport` says why.

What a graph is compiled for: the losses, the shapes, strides, dtypes and devices of all tensors,
the constants in batches and optimizers.  What may change from call to call without compiling
anew: the values of all tensors, those that a loss reads from outside included; tuned
hyperparameters; the optimizer state with its counters.  A loss is traced once: what it reads
from variables around it is watched (`guards`), what it does with Python objects is not.

What stays eager: losses that draw random numbers (a graph would repeat the same mask), that
branch on values or read them into Python, or that change tensors from outside; params in
bfloat16 and float16; batches with other objects than tensors and plain constants; TorchOpt rules
that cannot be traced; the ninth program for losses from the same source.

Graphs are kept in the process (`cache`), and by inductor on disk, for the next process, in
TORCHINDUCTOR_CACHE_DIR.
"""

from hypergrad.compiled.report import CompileReport

__all__ = ["CompileReport"]
