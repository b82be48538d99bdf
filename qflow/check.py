"""python -m qflow.check: what the device makes of a model under a qconfig, before anything is tuned."""

from qflow.commands.check import main

if __name__ == "__main__":
    main()
