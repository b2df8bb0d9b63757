"""Sparse fine-tuning: only some entries of the hidden weights of a pretrained network move."""
