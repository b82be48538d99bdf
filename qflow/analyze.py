"""python -m qflow.analyze: where a quantized model loses its accuracy, and which settings fix it."""

from qflow.process.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from qflow.commands.analyze import main

    main()
