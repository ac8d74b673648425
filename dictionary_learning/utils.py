"""Names that users of the reference import from here."""

from .checkpoint import load_dictionary

__all__ = ["load_dictionary"]
