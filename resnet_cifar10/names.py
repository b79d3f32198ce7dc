"""Names of files, which may hold anything, made fit to be shown."""

from __future__ import annotations

import unicodedata

JOINERS = "\u200c\u200d"  # of letters and of emoji


def printable(text: str) -> str:
    """Replace what would move a terminal's cursor or cannot be encoded by question marks."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in JOINERS else c for c in text)
