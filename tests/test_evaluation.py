"""The evaluation counts what it says it counts."""

import json
from dataclasses import replace

import pytest
import torch

from ldm import scenes
from ldm.errors import LDMError
from ldm.io.folders import read_json
from ldm.metrics import checker
from ldm.metrics.evaluation import QUESTIONS, Share, evaluate, evaluate_vae, held_out, load_checker, tally, verdict
from ldm.train.data import to_tensor


def test_wilson_interval_of_published_values():
    # Newcombe 1998, table I, case (a): 81 of 263 gives 0.2553 to 0.3662.
    low, high = Share(81, 263).interval
    assert (low, high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    low, high = Share(0, 20).interval  # case (c)
    assert low == pytest.approx(0.0, abs=1e-9) and high == pytest.approx(0.1611, abs=1e-4)


def scene(*things):
    return scenes.Scene("night", "snow", True, "plain", tuple(scenes.Thing(*thing) for thing in things), 0)


TWO = scene(("house", "red", "large", 30.0, 80.0), ("tree", "blue", "small", 90.0, 80.0))


def test_the_truth_is_all_right():
    assert all(all(found) for found in verdict(TWO, checker.answers(TWO)).values())
    assert verdict(TWO, checker.answers(TWO))["object"] == [True, True]


def test_left_goes_by_place_and_not_by_the_order_of_naming():
    right_first = replace(TWO, things=TWO.things[::-1])
    assert checker.answers(right_first) == checker.answers(TWO)
    assert (
        checker.answers(right_first)["left kind"] == "house" and checker.answers(right_first)["right color"] == "blue"
    )


def test_exchanged_objects_are_wrong_in_left_right_alone():
    swapped = scene(("tree", "blue", "small", 30.0, 80.0), ("house", "red", "large", 90.0, 80.0))
    found = verdict(TWO, checker.answers(swapped))
    assert found["left/right"] == [False]
    assert all(found[question] == [True, True] for question in ("object", "color", "size"))


def test_exchanged_colors_are_wrong_in_color_alone():
    leaked = scene(("house", "blue", "large", 30.0, 80.0), ("tree", "red", "small", 90.0, 80.0))
    found = verdict(TWO, checker.answers(leaked))
    assert found["color"] == [False, False] and found["object"] == [True, True] and found["left/right"] == [True]


def test_a_missing_object_is_wrong_and_not_asked_for_its_side():
    one = scene(("house", "red", "large", 60.0, 80.0))
    found = verdict(TWO, checker.answers(one))
    assert found["object"] == [True, False] and found["left/right"] == []
    assert verdict(TWO, checker.answers(TWO))["number"] == [True] and found["number"] == [False]
    for asked in TWO.things:  # the one on the left, then the one on the right
        surplus = verdict(replace(TWO, things=(asked,)), checker.answers(TWO))  # wrong in number alone
        assert surplus["number"] == [False]
        assert all(surplus[question] == [True] for question in ("object", "color", "size"))


def test_tally_adds_up():
    table = tally(
        [verdict(TWO, checker.answers(TWO)), verdict(TWO, checker.answers(scene(("car", "red", "large", 9, 9))))]
    )
    assert table["time"] == Share(2, 2) and table["object"] == Share(2, 4) and table["left/right"] == Share(1, 1)


def test_held_out_scenes_are_held_out_and_cover_every_answer():
    wanted = held_out(300)
    assert wanted == held_out(300)
    for one in wanted:  # not one thing of one of them was ever trained on in such a place
        place = (one.time, one.ground, one.style)
        assert all(scenes.held_out_combination(thing.kind, thing.color, *place) for thing in one.things)
    assert sum(len(one.things) == 2 for one in wanted) == 120
    for values, options in (
        ([one.time for one in wanted], scenes.TIMES),
        ([one.style for one in wanted], scenes.STYLES),
        ([one.things[0].kind for one in wanted], scenes.KINDS),
    ):
        counts = [values.count(option) for option in options]
        assert max(counts) - min(counts) <= 6, counts
    for values, options in (
        ([one.ground for one in wanted], scenes.GROUNDS),
        ([thing.color for one in wanted for thing in one.things], scenes.COLORS),
    ):  # 99.9 % of the chi-square statistics of uniform draws lie below these bounds (3 and 9 degrees of freedom)
        expected = len(values) / len(options)
        statistic = sum((values.count(option) - expected) ** 2 / expected for option in options)
        assert statistic < {4: 16.3, 10: 27.9}[len(options)], (options, statistic)


def test_labels_and_reading_speak_the_same_language():
    one = scenes.sample(5, "train")
    logits = [torch.nn.functional.one_hot(torch.tensor([label]), len(options)).float()
              for label, options in zip(checker.labels(one), checker.QUESTIONS.values(), strict=True)]  # fmt: skip
    model = checker.Checker()
    model.forward = lambda x: logits
    assert model.read(torch.zeros(1, 3, 128, 128)) == [checker.answers(one)]


def test_every_reported_question_is_judged():
    assert set(verdict(TWO, checker.answers(TWO))) == set(QUESTIONS)


def test_a_stopped_evaluation_goes_on_and_others_are_refused(tmp_path):
    import ldm

    pipe = ldm.load("scenes")
    said = []
    options = {"steps": 1, "batch": 1}
    whole = evaluate(pipe, 3, tmp_path / "whole", said.append, **options)
    evaluate(pipe, 2, tmp_path / "broken", said.append, **options)
    assert evaluate(pipe, 3, tmp_path / "broken", said.append, **options) == whole
    logs = [(tmp_path / name / "verdicts.jsonl").read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 3
    assert whole["drawn"]["time"][1] == 3 and "left/right" in said[0]
    with pytest.raises(LDMError, match="of other settings"):
        evaluate(pipe, 3, tmp_path / "whole", said.append, steps=2)
    settings = tmp_path / "whole" / "settings.json"
    for name in ("model", "checker"):  # other weights, and another judge
        settings.write_text(json.dumps(read_json(tmp_path / "broken" / "settings.json") | {name: "0" * 16}))
        with pytest.raises(LDMError, match="of another model or of other settings"):
            evaluate(pipe, 3, tmp_path / "whole", said.append, **options)


def test_the_vae_is_measured_as_in_training():
    import ldm
    from ldm.train import vae

    pipe = ldm.load("scenes")
    checker_, wanted = load_checker(pipe.folder), held_out(4)
    numbers = evaluate_vae(pipe, checker_, wanted)
    pictures = [scenes.render(one) for one in wanted]
    x = torch.stack([to_tensor(picture.image[None])[0] for picture in pictures])
    mask = torch.stack([torch.from_numpy(picture.masks.any(axis=0)) for picture in pictures])
    y = pipe.vae.decode(pipe.vae.encode(x))
    assert numbers["psnr"]["everywhere"] == pytest.approx(vae.psnr(y, x), abs=0.05)  # rounded to grey levels, and not
    assert numbers["psnr"]["inside objects"] == pytest.approx(vae.psnr(y, x, mask), abs=0.05)
    true = numbers["checker on true pictures"]
    assert true["time"].value == true["style"].value == 1.0


def test_a_model_without_a_checker_is_told_so(tmp_path):
    with pytest.raises(LDMError, match="There is no checker for"):
        load_checker(tmp_path / "model")
