"""python -m qflow <command>: the one command line, as `qflow <command>`."""

from qflow.commands.main import main

if __name__ == "__main__":
    main()
