"""`python -m fasim` is the command `fasim`."""

from .cli.main import main

if __name__ == "__main__":
    main()
