"""How a process keeps freed memory, and how its threads wait."""

__all__ = ["allocator", "waiting"]
