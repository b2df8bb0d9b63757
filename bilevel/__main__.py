"""`python -m bilevel`: the command line."""

from studies.cli import main

main()
