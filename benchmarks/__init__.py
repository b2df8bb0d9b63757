"""Measurements: ratios to a named yardstick, with their conditions."""
