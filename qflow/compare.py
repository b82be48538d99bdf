"""python -m qflow.compare: trials side by side: metrics with their noise, cost, and the operators that differ."""

from qflow.process.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from qflow.commands.compare import main

    main()
