"""One trial: what steps, what it reports, and what comes out of it."""
