"""What `ldm` says to its users: the one exception that it raises on purpose, and lines on stderr."""

import difflib
import sys
from collections.abc import Iterable

STOPPED = 130  # what a command returns that Ctrl-C ended


class LDMError(Exception):
    """A mistake a user can mend: one sentence that says what, where and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A helpful end for the sentence about an unknown name: " Did you mean 'ddim'?", or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def say_on_stderr(line: str) -> None:
    """Say what a user should know though nothing is wrong: what was passed over, cut off or chosen instead."""
    print(line, file=sys.stderr)
