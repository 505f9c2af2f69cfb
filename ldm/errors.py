"""What `ldm` says to its users: the one exception that it raises on purpose, and lines on stderr."""

import difflib
import sys
from collections.abc import Iterable

STOPPED = 130  # what a command returns that Ctrl-C ended


class LDMError(Exception):
    """A mistake a user can mend: one sentence that says what, where and what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A helpful end for the sentence about an unknown name: " Did you mean 'ddim'?", or nothing."""
    likeness = {each: difflib.SequenceMatcher(None, each, word).ratio() for each in known}
    closest = max(likeness, key=likeness.get, default="")  # of equals the first, as the lists have the usual one
    return f" Did you mean {closest!r}?" if likeness.get(closest, 0) >= 0.5 else ""


def say_on_stderr(line: str) -> None:
    """Say what a user should know though nothing is wrong: what was passed over, cut off or chosen instead."""
    print(line, file=sys.stderr)
