"""Benchmarks of self-tuning networks; each module is one command, ``python -m`` its name."""
