"""`python -m fasim.cli` is the command `fasim`."""

from .main import main

main()
