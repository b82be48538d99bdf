"""python -m qflow.describe: whether studies, runs, leases, cache and registry agree, and what can be mended."""

from qflow.process.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from qflow.commands.describe import main

    main()
