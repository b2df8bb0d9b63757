"""What the server of worker processes imports."""

from studies.collector import imports

with imports():
    import studies.worker  # noqa: F401
