"""A stand-in of the public names of Horizon's plugin, OpenExplorer 3.0.x, for tests; it is not the plugin.

It was written in plain torch from published facts about the plugin's behaviour, without code of the plugin or of
qflow, so that two implementations are compared. Where a fact is missing, it raises MissingFact.
"""

__version__ = "3.0.17"


class MissingFact(NotImplementedError):
    """What the plugin does here is not known."""
