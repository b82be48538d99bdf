"""python -m qflow.export: write a trial to the files that a tool chain takes."""

from qflow.process.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from qflow.commands.export import main

    main()
