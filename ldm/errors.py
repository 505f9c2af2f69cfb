"""The one exception that `ldm` raises on purpose."""

import difflib
from collections.abc import Iterable


class LDMError(Exception):
    """A mistake a user can mend: one sentence that says what, where and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A helpful end for the sentence about an unknown name: " Did you mean 'ddim'?", or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
