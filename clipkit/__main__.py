"""`python -m clipkit`: the command line, as the launchers start it."""

from clipkit.cli import main

main()
