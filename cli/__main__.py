"""`python -m fasim.cli` is the command `fasim`."""

from .main import main

if __name__ == "__main__":
    main()
