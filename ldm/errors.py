"""What `ldm` says to its users: the one exception that it raises on purpose, and lines on stderr."""

import difflib
import sys
from collections.abc import Iterable

STOPPED = 130  # what a command returns that Ctrl-C ended
MOST_LETTERS = 1000  # of a sentence: a stranger's file may hold a name of millions


class LDMError(Exception):
    """A mistake a user can mend: one sentence that says what, where and what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor, change its colours or turn its writing; and not too long.

    Names and values out of files that strangers made stand in sentences. Of a long one the middle is left out: what
    to do stands at the end.
    """
    if len(text) > MOST_LETTERS:
        text = f"{text[: MOST_LETTERS - 205]} ... {text[-200:]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def bytes_in_words(size: float) -> str:
    """In the units that shops and the hub count in: 4.3 GB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def nearest(word: str, known: Iterable[str]) -> str:
    """A helpful end for the sentence about an unknown name: " Did you mean 'ddim'?", or nothing."""
    word = word[:100]  # of a stranger's million letters the comparison would take minutes
    likeness = {each: difflib.SequenceMatcher(None, each, word).ratio() for each in known}
    closest = max(likeness, key=likeness.get, default="")  # of equals the first, as the lists have the usual one
    return f" Did you mean {closest!r}?" if likeness.get(closest, 0) >= 0.5 else ""


def say_on_stderr(line: str) -> None:
    """Say what a user should know though nothing is wrong: what was passed over, cut off or chosen instead."""
    print(printable(line), file=sys.stderr)
