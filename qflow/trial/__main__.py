"""python -m qflow.trial: one trial, by hand or again from its run."""

from qflow.process.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from qflow.commands.trial import main

    main()
