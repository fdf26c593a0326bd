"""`python -m qpipe.cli`, which is what launchers start."""

from qpipe.cli import main

if __name__ == "__main__":
    main()
