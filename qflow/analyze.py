"""python -m qflow.analyze: where a quantized model loses its accuracy, and which settings fix it."""

from qflow.commands.analyze import main

if __name__ == "__main__":
    main()
