"""optuna-dashboard on this machine alone, with our figures."""
