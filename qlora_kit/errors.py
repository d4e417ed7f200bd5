"""Errors that tell the user what was wrong, what is allowed, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KitError(ValueError):
    """Bad input. The message is one a user can act on; the command line prints it alone and exits with 2."""


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name most like `name`, or None where nothing is close."""
    by_fold = {str(candidate).lower(): str(candidate) for candidate in allowed}
    close = difflib.get_close_matches(str(name).lower(), by_fold, n=1, cutoff=0.5)
    return by_fold[close[0]] if close else None


def unknown(what: str, name: object, allowed: Iterable[str]) -> KitError:
    """Return the error for a name that is none of `allowed`.

    Args:
        what: What kind of thing was named, e.g. `"preset"`.
        name: The name that was given.
        allowed: Every name that would have been accepted.

    Returns:
        An error, to be raised by the caller, that lists what is allowed and names the nearest match.
    """
    names = [str(candidate) for candidate in allowed]
    guess = nearest(str(name), names)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return KitError(f"there is no {what} {name!r}.{hint} Allowed: {', '.join(names)}.")
