"""python -m qflow.tune: tune the precision mix of a model, every trial tracked."""

from qflow.process.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from qflow.commands.tune import main

    main()
