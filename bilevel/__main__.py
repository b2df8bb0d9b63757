"""`python -m bilevel`: the command line."""

from studies.commands.cli import main

main()
