"""What `python -m qflow.<name>` does: tune, check, analyze, cost, promote.

Nothing imports a command: what commands share lies below them.
"""
