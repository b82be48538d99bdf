"""python -m qflow.compare: trials side by side: metrics with their noise, cost, and the operators that differ."""

from qflow.commands.compare import main

if __name__ == "__main__":
    main()
