"""Cost, memory and error of a hypergradient: this library, its peers, plain training.

python -m benchmarks.hypergrad
"""
