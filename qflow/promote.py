"""python -m qflow.promote: rebuild the best trial from its run, verify every number, register it."""

from qflow.commands.promote import main

if __name__ == "__main__":
    main()
