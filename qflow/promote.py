"""python -m qflow.promote: rebuild the best trial from its run, verify every number, register it."""

from qflow.process.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from qflow.commands.promote import main

    main()
