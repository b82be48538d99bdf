"""python -m qflow.tune: tune the precision mix of a model, every trial tracked."""

from qflow.commands.tune import main

if __name__ == "__main__":
    main()
