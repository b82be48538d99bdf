"""python -m qflow.export: write a trial to the files that a tool chain takes."""

from qflow.commands.export import main

if __name__ == "__main__":
    main()
