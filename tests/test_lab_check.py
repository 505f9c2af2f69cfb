"""Exercises: every right answer is called right, every named mistake by its name, whoever the reader is.

Also that a check never stops a notebook, and does where it is told to be strict.
"""

import numpy as np
import pytest
import torch

import ldm
from ldm.errors import LDMError
from ldm.lab.check import RIGHT, TO_DO, WRONG, Exercise, Told, all_exercises, calling, find, judge, seed_of

EXERCISES = all_exercises()
SEEDS = (0, 1, 2**32 - 1)  # readers
MISTAKES = [(name, sentence) for name, exercise in EXERCISES.items() for sentence in exercise.wrong]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_is_right(name):
    for seed in SEEDS:
        assert judge(EXERCISES[name], EXERCISES[name].right, seed) == (RIGHT, "right.")


@pytest.mark.parametrize(("name", "sentence"), MISTAKES)
def test_a_known_mistake_is_called_by_its_name(name, sentence):
    exercise = EXERCISES[name]
    for seed in SEEDS:
        assert judge(exercise, exercise.wrong[sentence], seed) == (WRONG, sentence)


def test_there_are_enough_of_them():
    """The issue's figures, over notebooks 00 to 09, each with some."""
    notebooks = {name.partition(".")[0] for name in EXERCISES}
    assert notebooks == {f"{k:02d}" for k in range(10)}
    assert len(EXERCISES) >= 35 and len(MISTAKES) >= 100
    for notebook in notebooks:
        names = list(all_exercises(notebook))
        assert names == [f"{notebook}.{k + 1}" for k in range(len(names))], names


@pytest.mark.parametrize("name", EXERCISES)
def test_no_answer_at_all_is_still_to_do(name):
    """A student's notebook before anything is filled in: the body of a function is `...`."""
    for empty in (lambda *arguments, **named: ..., lambda *arguments, **named: None, ..., None):
        assert judge(EXERCISES[name], empty, 0).state == TO_DO


# ---------------------------------------------------------------------------------------------------- the check itself


def twice(x, k):
    return 2 * x + k


PLAIN = Exercise(
    "twice(x, k)",
    twice,
    calling(lambda g: (torch.randn(3, generator=g), 1)),
    {"it doubles k as well.": lambda x, k: 2 * x + 2 * k, "it breaks down.": lambda x, k: 1 / 0},
)


def broken(x, k):
    raise KeyError("no such thing")


def in_place(x, k):
    return x.mul_(2).add_(k)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda x, k: 3 * x + k, "the shape is right, the numbers are not: off by up to "),
        (lambda x, k: twice(x, k)[:2], "the shape is (2,), and should be (3,)."),
        (lambda x, k: twice(x, k) / 0, "some of its numbers are not finite (NaN or infinity)."),
        (lambda x, k: twice(x, k).tolist(), "it gives a thing of type list, where a tensor belongs."),
        (lambda x, k: twice(x, k) + 0j, "the numbers are complex, and should be real."),
        (lambda x: x, "it stops with TypeError: "),
        (broken, "it stops with KeyError: 'no such thing', at `raise KeyError(\"no such thing\")`."),
        (in_place, "it changes its arguments in place: make new ones, the caller still needs his."),
        (lambda x, k: 2 * x + 2 * k, "it doubles k as well."),
        (7.0, "it gives a thing of type float, where a tensor belongs."),
    ],
)
def test_what_a_wrong_answer_is_told(answer, sentence):
    verdict = judge(PLAIN, answer, 5)
    assert verdict.state == WRONG and verdict.sentence.startswith(sentence)


class Mute(Exception):
    def __str__(self):
        raise ValueError


class Unshowable:
    def __repr__(self):
        raise ValueError


def leave(x, k):
    raise SystemExit(3)


def mute(x, k):
    raise Mute


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (leave, "it stops with SystemExit: 3, at "),
        (mute, "it stops with Mute: an error that has no text, at `raise Mute`."),
        (lambda x, k: twice(x, k).to("meta"), "what it gives can't be compared with the right answer ("),
        (lambda x, k: twice(x, k).to_sparse(), "what it gives can't be compared with the right answer ("),
        (lambda x, k: torch.nested.nested_tensor([x, x]), "what it gives can't be compared with the right answer ("),
        (lambda x, k: Unshowable(), "it gives a thing of type Unshowable, where a tensor belongs."),
    ],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_nothing_that_an_answer_does_stops_a_notebook(answer, sentence):
    verdict = judge(PLAIN, answer, 5)
    assert verdict.state == WRONG and verdict.sentence.startswith(sentence)


def test_a_thing_that_cannot_be_shown_is_wrong():
    of_texts = Exercise("text()", lambda: "a", calling(()))
    assert judge(of_texts, Unshowable, 0).sentence.startswith("what it gives can't be compared")


def not_yet(x, k):
    raise NotImplementedError


def test_what_is_not_written_yet_is_to_do():
    assert judge(PLAIN, not_yet, 5).state == TO_DO


def test_answers_of_other_kinds_are_compared_too():
    of_texts = Exercise("names()", lambda: ["a", {"b": True}], calling(()))
    assert judge(of_texts, lambda: ["a", {"b": True}], 0).state == RIGHT
    for wrong in (["a"], ["a", {"c": True}], ["a", {"b": 1}], ["b", {"b": True}], 3, ["a", 3]):
        assert judge(of_texts, lambda wrong=wrong: wrong, 0).state == WRONG
    assert judge(of_texts, lambda: ["a"], 0).sentence == "it gives 1 things, where 2 belong."
    of_numbers = Exercise("number()", 3, calling(()), {"one too many.": 4})
    assert judge(of_numbers, 3, 0).state == RIGHT
    assert judge(of_numbers, 4, 0) == (WRONG, "one too many.")
    assert judge(of_numbers, "three", 0) == (WRONG, "it gives a thing of type str, where numbers belong.")


def test_a_number_is_as_good_as_a_tensor_that_holds_one_and_a_tensor_as_a_list():
    of_a_share = Exercise("share(x)", lambda x: x.mean(), calling(lambda g: (torch.rand(4, generator=g),)))
    for answer in (lambda x: x.mean().item(), lambda x: np.mean(x.numpy()), lambda x: x.sum() / 4):
        assert judge(of_a_share, answer, 0).state == RIGHT
    of_sizes = Exercise("sizes()", lambda: [1, 2, 3], calling(()))
    for answer in (lambda: torch.tensor([1, 2, 3]), lambda: np.array([1, 2, 3]), lambda: (1, 2, 3)):
        assert judge(of_sizes, answer, 0).state == RIGHT
    assert judge(of_sizes, lambda: torch.tensor([1, 2, 4]), 0).state == WRONG


def test_a_property_that_fails_is_said_in_its_own_words():
    def positive(answer, generator):
        if answer(1.0) <= 0:
            raise Told("it should be above zero.")
        return []

    exercise = Exercise("f(x)", abs, positive)
    assert judge(exercise, lambda x: 5 * x, 0).state == RIGHT
    assert judge(exercise, lambda x: -x, 0) == (WRONG, "it should be above zero.")


def test_a_check_leaves_the_notebook_s_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    judge(PLAIN, lambda x, k: x + torch.randn(3), 0)
    assert torch.equal(torch.randn(2), expected)


def test_readers_have_numbers_of_their_own(monkeypatch):
    monkeypatch.setenv("LDM_READER", "anna")
    anna = seed_of("06.1")
    assert anna == seed_of("06.1") != seed_of("06.2")
    monkeypatch.setenv("LDM_READER", "ben")
    assert anna != seed_of("06.1")
    monkeypatch.delenv("LDM_READER")
    monkeypatch.setattr("getpass.getuser", lambda: "anna")
    assert anna == seed_of("06.1")

    def nobody():
        raise OSError("no login name")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert isinstance(seed_of("06.1"), int)


def test_what_a_reader_sees(capsys, monkeypatch):
    monkeypatch.delenv("LDM_STRICT", raising=False)
    right = find("06.1").right
    for answer in (right, lambda u, c, s: c + s * (u - c), lambda u, c, s: ...):
        assert ldm.check("06.1", answer) is None
    ldm.check("06.1")
    assert capsys.readouterr().out.splitlines() == [
        "✅ 06.1 (cfg(uncond, cond, s)): right.",
        "❌ 06.1 (cfg(uncond, cond, s)): cond and uncond are swapped: this steers away from the prompt.",
        "⏳ 06.1 (cfg(uncond, cond, s)): to do (it returns nothing yet).",
        "⏳ 06.1 (cfg(uncond, cond, s)): to do.",
    ]
    ldm.check("06.19", right)
    ldm.check("66.1", right)
    ldm.check(6.1, right)
    ldm.check(["06.1"], right)
    lines = capsys.readouterr().out.splitlines()
    assert "There is no exercise '06.19'; there are 06.1, 06.2, 06.3, 06.4. Did you mean '06.1'?" in lines[0]
    assert "There is no exercise '66.1'; the notebooks with exercises are 00, 01, 02" in lines[1]
    assert "There is no exercise 6.1" in lines[2] and "There is no exercise ['06.1']" in lines[3]


def test_strict_is_strict(capsys, monkeypatch):
    monkeypatch.setenv("LDM_STRICT", "1")
    ldm.check("06.1", find("06.1").right)
    for answer in (lambda u, c, s: c, lambda u, c, s: ...):
        with pytest.raises(LDMError, match=r"06\.1 \(cfg"):
            ldm.check("06.1", answer)
    with pytest.raises(LDMError, match="no exercise"):
        ldm.check("06.9", find("06.1").right)
    ldm.check("06.1", strict=False)
    monkeypatch.delenv("LDM_STRICT")
    with pytest.raises(LDMError, match="to do"):
        ldm.check("06.1", strict=True)
