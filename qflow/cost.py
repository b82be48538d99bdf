"""python -m qflow.cost: what a qconfig costs on the device; `fit` fits the parameters."""

from qflow.process.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from qflow.commands.cost import main

    main()
