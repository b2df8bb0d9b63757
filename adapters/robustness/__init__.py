"""Robustness: fine-tuning and adaptation that hold under shifts."""
