"""rfloor: a declarative registry of batch-1 decode experiments."""

__version__ = "0.1.0"
