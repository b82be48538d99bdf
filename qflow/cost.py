"""python -m qflow.cost: what a qconfig costs on the device; `fit` fits the parameters."""

from qflow.commands.cost import main

if __name__ == "__main__":
    main()
