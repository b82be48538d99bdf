"""python -m qflow <command>: the one command line, as `qflow <command>`."""

from qflow.process.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from qflow.commands.main import main

    main()
