"""python -m qflow.doctor: whether studies, runs, leases, cache and registry agree, and what can be mended."""

from qflow.commands.doctor import main

if __name__ == "__main__":
    main()
