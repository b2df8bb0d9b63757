"""What the server of worker processes imports."""

from studies.storage.collector import imports

with imports():
    import studies.runner.worker  # noqa: F401
