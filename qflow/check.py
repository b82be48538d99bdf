"""python -m qflow.check: what the device makes of a model under a qconfig, before anything is tuned."""

from qflow.process.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from qflow.commands.check import main

    main()
