"""Solvers: problems solved by iterations instead of training."""
