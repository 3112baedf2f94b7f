"""`python -m stepstate.cli`."""

from stepstate.cli import main

main()
