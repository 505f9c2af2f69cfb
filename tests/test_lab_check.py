"""Exercises: every right answer is called right, every named mistake by its name, whoever the reader is.

Also that a check never stops a notebook, and does where it is told to be strict.
"""

import torch
import pytest

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
