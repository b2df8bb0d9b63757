"""Training objectives: what a network is asked for."""
