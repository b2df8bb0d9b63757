"""What the server of worker processes imports."""

from studies.storage.collector import imports

with imports():
    import studies.trial.worker  # noqa: F401
