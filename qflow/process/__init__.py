"""How a process keeps freed memory, how its threads wait, and how it is interrupted."""

__all__ = ["allocator", "interrupts", "running", "waiting"]
