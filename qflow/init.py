"""python -m qflow.init: write a task of your own, which runs as it is."""

from qflow.process.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from qflow.commands.init import main

    main()
