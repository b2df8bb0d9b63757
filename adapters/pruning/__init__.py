"""Pruning: networks that lose weights by rounds, with training in between."""
