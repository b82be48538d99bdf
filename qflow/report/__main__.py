"""python -m qflow.report: render the report of a study again, from its runs alone."""

from qflow.process.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from qflow.commands.report import main

    main()
