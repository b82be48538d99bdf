"""python -m qflow.report: render the report of a study again, from its runs alone."""

from qflow.commands.report import main

if __name__ == "__main__":
    main()
