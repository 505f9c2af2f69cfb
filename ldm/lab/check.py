"""Exercises whose check says which mistake was made.

    ldm.check("06.1", cfg)      # the reader's own function

An answer is used as the right one is, and the outcomes are compared. Where they differ, the outcomes of wrong answers
that are known by name are compared with it as well: the one that agrees names the mistake. A check has three outcomes:
to do, wrong, right. It never stops a notebook, unless LDM_STRICT is 1 in the environment, as in our own tests. The
numbers that an answer is tried with are drawn from the reader's name (LDM_READER in the environment, or that of the
login), so that two readers compare their functions and not their figures.
"""

import copy
import getpass
import hashlib
import importlib
import os
import pkgutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.errors import LDMError, nearest
from ldm.lab import exercises

TO_DO, WRONG, RIGHT = "to do", "wrong", "right"
SIGNS = {TO_DO: "⏳", WRONG: "❌", RIGHT: "✅"}
PACKAGE = Path(__file__).resolve().parent.parent
STRICT, READER = "LDM_STRICT", "LDM_READER"  # environment variables

Use = Callable[[object, torch.Generator], Sequence]


class Told(Exception):
    """A mistake that is found while an answer is used: one sentence to the reader."""


@dataclass(frozen=True)
class Exercise:
    """What is asked, the right answer, and wrong answers under the sentence that names their mistake.

    `use(answer, generator)` tries an answer with numbers from the generator and returns its outcomes, which are then
    compared: tensors, arrays, numbers, texts, and lists of them. It raises `Told` where a property doesn't hold; an
    exercise with many right answers does only that. `calling` makes a `use` out of arguments.
    """

    asks: str
    right: object
    use: Use
    wrong: Mapping[str, object] = field(default_factory=dict)
    atol: float = 1e-5
    rtol: float = 1e-4


class Verdict(NamedTuple):
    """What a check found: `state` is "to do", "wrong" or "right"."""

    state: str
    sentence: str


def check(name: str, answer: object = ..., *, strict: bool | None = None) -> None:
    """Say whether an exercise's answer is right, and if not, what is wrong with it: `ldm.check("06.1", cfg)`.

    Raises LDMError for anything but a right answer if `strict`, and otherwise nothing. Left out, `strict` is whether
    LDM_STRICT is 1 in the environment.
    """
    try:
        exercise = find(name)
    except LDMError as error:
        verdict, asks = Verdict(WRONG, str(error)), "no such exercise"
    else:
        verdict, asks = judge(exercise, answer, seed_of(name)), exercise.asks
    line = line_of(name, asks, verdict)
    strict = os.environ.get(STRICT) == "1" if strict is None else strict
    if strict and verdict.state != RIGHT:
        raise LDMError(line)
    print(line)


def line_of(name: str, asks: str, verdict: Verdict) -> str:
    """What a check prints."""
    return f"{SIGNS[verdict.state]} {name} ({asks}): {verdict.sentence}"


def find(name: str) -> Exercise:
    """The exercise of that name, "06.1": the first of notebook 06. Raises LDMError if there is none."""
    known = all_exercises(str(name).partition(".")[0])
    if not isinstance(name, str) or name not in known:
        numbers = [found.name.removeprefix("n") for found in pkgutil.iter_modules(exercises.__path__)]
        there = f"there are {', '.join(known)}" if known else f"the notebooks with exercises are {', '.join(numbers)}"
        raise LDMError(f"There is no exercise {name!r}; {there}.{nearest(str(name), known)}")
    return known[name]


def all_exercises(notebook: str | None = None) -> dict[str, Exercise]:
    """Every exercise by its name, or those of one notebook ("06")."""
    found = {}
    for module in pkgutil.iter_modules(exercises.__path__):
        if module.name.startswith("n") and notebook in (None, module.name.removeprefix("n")):
            found |= importlib.import_module(f"{exercises.__name__}.{module.name}").EXERCISES
    return found


def seed_of(name: str) -> int:
    """The reader's own seed for an exercise."""
    try:
        reader = os.environ.get(READER) or getpass.getuser()
    except (KeyError, OSError, ImportError):  # a login without a name
        reader = "reader"
    return int.from_bytes(hashlib.sha256(f"{reader}|{name}".encode()).digest()[:4], "big")


def judge(exercise: Exercise, answer: object, seed: int) -> Verdict:
    """Try an answer beside the right one, and say which mistake it makes. Raises nothing that the answer raises."""
    if answer is None or answer is ...:
        return Verdict(TO_DO, "to do.")
    try:
        outcome = tried(exercise, answer, seed)
    except NotImplementedError:
        return Verdict(TO_DO, "to do.")
    except Told as told:
        return Verdict(WRONG, str(told))
    except (Exception, SystemExit) as error:
        return Verdict(WRONG, stumbled(error))
    if outcome and all(each is None or each is ... for each in outcome):
        return Verdict(TO_DO, "to do (it returns nothing yet).")
    truth = tried(exercise, exercise.right, seed)
    try:
        difference = differs(outcome, truth, exercise)
    except Exception as error:  # sparse, nested, on the meta device, or a thing that cannot even be shown
        kind = type(error).__name__
        return Verdict(WRONG, f"what it gives can't be compared with the right answer ({kind}): give plain tensors.")
    if difference is None:
        return Verdict(RIGHT, "right.")
    for sentence, wrong in exercise.wrong.items():
        try:
            same = differs(outcome, tried(exercise, wrong, seed), exercise) is None
        except Exception:  # a wrong answer may break down, and then it is not this one
            same = False
        if same:
            return Verdict(WRONG, sentence)
    return Verdict(WRONG, difference)


def tried(exercise: Exercise, answer: object, seed: int) -> list:
    """The outcomes of an answer; the notebook's own stream of random numbers stays where it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return list(exercise.use(answer, torch.Generator().manual_seed(seed)))


def stumbled(error: BaseException) -> str:
    """What broke, and in which line of the reader's."""
    try:
        said = " ".join(str(error).split())[:200]
    except Exception:  # an error of the reader's own making
        said = "an error that has no text"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(str(PACKAGE))]
    place = f", at `{own[-1].line}`" if own and own[-1].line else ""
    return f"it stops with {type(error).__name__}: {said}{place}."


# ------------------------------------------------------------------------------------------ trying and comparing


def calling(*cases: Callable[[torch.Generator], Sequence] | Sequence) -> Use:
    """A `use` that calls the answer with each case: a tuple of arguments, or a function that draws one or several.

    An answer that is no function, a number say, is its own outcome. Arguments are lent: one that is changed in place is
    noticed.
    """

    def use(answer: object, generator: torch.Generator) -> list:
        outcomes = []
        for arguments in drawn(cases, generator):
            lent = copy.deepcopy(arguments)
            outcomes.append(answer(*lent) if callable(answer) else answer)
            numbers = (
                pair for pair in zip(arguments, lent, strict=True) if isinstance(pair[0], Tensor | np.ndarray | list)
            )
            if any(differs(theirs, mine) for mine, theirs in numbers):
                raise Told("it changes its arguments in place: make new ones, the caller still needs his.")
        return outcomes

    return use


def drawn(cases: Sequence, generator: torch.Generator) -> list[tuple]:
    """The cases as tuples of arguments."""
    found = []
    for case in cases:
        made = case(generator) if callable(case) else case
        found += made if isinstance(made, list) else [made]
    return found


def differs(got: object, right: object, exercise: Exercise | None = None) -> str | None:
    """How an outcome differs from the right one, without giving it away; None if it doesn't."""
    atol, rtol = (exercise.atol, exercise.rtol) if exercise else (0.0, 0.0)
    if isinstance(right, Tensor | np.ndarray | Number | np.generic) and not isinstance(right, bool):
        return numbers_differ(got, right, atol, rtol)
    if isinstance(right, list | tuple):
        if isinstance(got, Tensor | np.ndarray) and all(isinstance(each, Number) for each in right):
            got = got.tolist()
        if not isinstance(got, list | tuple):
            return f"it gives a thing of type {type(got).__name__}, where {len(right)} things belong."
        if len(got) != len(right):
            return f"it gives {len(got)} things, where {len(right)} belong."
        found = (differs(mine, theirs, exercise) for mine, theirs in zip(got, right, strict=True))
        return next((sentence for sentence in found if sentence), None)
    if isinstance(right, dict):
        if not isinstance(got, dict) or got.keys() != right.keys():
            return f"it should give a dict with the keys {', '.join(map(repr, right))}."
        return differs(list(got.values()), [right[key] for key in got], exercise)
    return None if type(got) is type(right) and got == right else f"it gives {got!r} for a case, which is not right."


def numbers_differ(got: object, right: object, atol: float, rtol: float) -> str | None:
    """`differs` for tensors, arrays and numbers: type, shape, finiteness, then values."""
    if isinstance(right, Tensor) and right.dim() == 0 and isinstance(got, Number | np.generic):
        got = torch.as_tensor(got)  # a loss or a share: a plain number will do
    if isinstance(right, Tensor) and not isinstance(got, Tensor):
        return f"it gives a thing of type {type(got).__name__}, where a tensor belongs."
    try:
        mine, theirs = (torch.as_tensor(each).detach() for each in (got, right))
    except (TypeError, ValueError, RuntimeError):
        return f"it gives a thing of type {type(got).__name__}, where numbers belong."
    if mine.shape != theirs.shape:
        return f"the shape is {tuple(mine.shape)}, and should be {tuple(theirs.shape)}."
    if mine.is_complex() != theirs.is_complex():
        return "the numbers are complex, and should be real." if mine.is_complex() else "the numbers should be complex."
    mine, theirs = (each.to(torch.complex128 if each.is_complex() else torch.float64) for each in (mine, theirs))
    if torch.isfinite(theirs).all() and not torch.isfinite(mine).all():
        return "some of its numbers are not finite (NaN or infinity)."
    if torch.allclose(mine, theirs, rtol=rtol, atol=atol, equal_nan=True):
        return None
    scale = theirs.abs().max().item()
    off = (mine - theirs).abs().max().item()
    return f"the shape is right, the numbers are not: off by up to {off:.3g}, where they reach {scale:.3g}."
