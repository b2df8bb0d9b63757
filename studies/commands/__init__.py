"""The `bilevel` command line."""
