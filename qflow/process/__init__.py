"""How a process keeps freed memory, how its threads wait, how it is interrupted, and what it does if a call hangs."""

__all__ = ["allocator", "hanging", "interrupts", "running", "waiting"]
