"""Names that users of the reference import from here."""

from .formats import load_dictionary

__all__ = ["load_dictionary"]
