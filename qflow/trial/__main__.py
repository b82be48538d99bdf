"""python -m qflow.trial: one trial, by hand or again from its run."""

from qflow.commands.trial import main

if __name__ == "__main__":
    main()
