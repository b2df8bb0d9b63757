"""A local Ray cluster that the tests of a session share."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Two CPUs of this host; skips where Ray is not installed."""
    ray = pytest.importorskip("ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    with warnings.catch_warnings():  # Ray leaves its processes to the garbage collector
        warnings.simplefilter("ignore")
        ray.shutdown()
        gc.collect()
