"""Labels that look the same but differ in bytes or in a letter."""

from __future__ import annotations

import unicodedata

from .splitting import as_seen


def composed(label: str) -> str:
    """Return a label with its letters in one Unicode form (NFC): `é` may be written in two ways."""
    return unicodedata.normalize("NFC", label)


# Cyrillic and Greek letters, and the Latin letters that they look like.
_LATIN = str.maketrans("аеіјорсухѕһԛԝАВЕЅІЈКМНОРСТХԚԜΑΒΕΖΗΙΚΜΝΟΡΤΥΧον", "aeijopcyxshqwABESIJKMHOPCTXQWABEZHIKMNOPTYXov")


def look_of(label: str) -> str:
    """Return a key that is equal for labels that look the same."""
    return " ".join(as_seen(label).translate(_LATIN).split())
