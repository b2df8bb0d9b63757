"""How a study runs: its coordinator, who goes on at a rung, a trial from start to end."""
