"""What a ControlNet looks at: that it is what the authors' tools make, and that what looks wrong is said."""

import argparse
import hashlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import conditions, scenes
from ldm.cli import condition
from ldm.cli.options import Parser
from ldm.conditions import (
    CONDITIONS,
    already_processed,
    canny,
    check_range,
    depth_picture,
    doubts,
    estimate_depth,
    pose,
    prepare,
    read_pose,
    scribble,
    segmentation,
    to_tensor,
)
from ldm.conditions.palette import ADE20K, JOINTS, LIMBS, OPENPOSE
from ldm.errors import LDMError

cv2 = pytest.importorskip("cv2")

SEEDS = range(12)


@pytest.fixture(scope="module")
def photos():
    return [Image.fromarray(scenes.render(scenes.sample(seed)).image) for seed in SEEDS]


def refused(call, *words):
    with pytest.raises(LDMError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith((".", "?")) and "\n" not in text and len(text) < 500
    assert all(word in text for word in words), text


def pixels(image):
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    return np.asarray(image).astype(int)


# ---------------------------------------------------------------------------------------------------- edges


def test_canny_is_opencvs(photos):
    for photo in photos:
        a = np.asarray(photo)
        for low, high in ((100, 200), (20, 60), (100, 600)):
            edges = cv2.Canny(a, low, high)
            assert np.array_equal(pixels(canny(photo, low, high)), np.stack([edges] * 3, axis=2))
        assert np.array_equal(pixels(canny(photo)), pixels(canny(photo, 100, 200)))


def test_cannys_thresholds_matter(photos):
    for photo in photos:
        shares = [(pixels(canny(photo, *pair)) > 0).mean() for pair in ((10, 20), (20, 200), (100, 200), (500, 1000))]
        assert shares[0] > shares[1] > shares[2] > shares[3] and 0.01 < shares[2] < 0.25
    assert set(np.unique(pixels(canny(photos[0])))) == {0, 255}


def test_canny_refuses_thresholds():
    for low, high in ((200, 100), (-1, 100), (math.nan, 100), (1, math.inf)):
        refused(lambda low=low, high=high: canny(np.zeros((8, 8), np.uint8), low, high), "low", "high")


def test_without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    refused(lambda: canny(np.zeros((8, 8), np.uint8)), "OpenCV", "opencv-python-headless")
    refused(lambda: scribble(np.zeros((8, 8), np.uint8)), "OpenCV")


def test_scribbles_are_thick_lines_along_outlines(photos):
    for photo in photos:
        lines, edges = pixels(scribble(photo))[:, :, 0], pixels(canny(photo))[:, :, 0]
        assert set(np.unique(lines)) == {0, 255} and lines.shape == edges.shape
        assert (lines > 0).mean() > 1.3 * (edges > 0).mean() and (lines > 0).mean() < 0.4
        assert lines[edges > 0].mean() / 255 > 2 * lines.mean() / 255  # where there are edges, lines are likelier
    assert not pixels(scribble(Image.new("RGB", (64, 64), "teal"))).any()


@pytest.mark.parametrize("size", [64, 128, 512, 1600])
def test_scribbles_see_the_same_contrast_at_every_size(size):
    for contrast, seen in ((30, False), (90, True)):
        half = np.full((size, size), 100, np.uint8)
        half[:, size // 2 :] += contrast
        assert pixels(scribble(half)).any() == seen


def test_a_scribbles_pen_grows_with_the_picture():
    for size, width in ((512, 13), (1024, 25), (128, 3)):
        half = np.zeros((size, size), np.uint8)
        half[:, size // 2 :] = 255
        drawn = pixels(scribble(half))
        assert set(np.unique(drawn)) == {0, 255}  # though large ones are drawn at 512 and enlarged
        row = drawn[size // 2, :, 0] > 0
        assert abs(row.sum() - width) <= 2 and abs(np.flatnonzero(row).mean() - size / 2) <= 1.5


# ---------------------------------------------------------------------------------------------------- depth


def test_depth_is_not_stretched():
    depth = scenes.render(scenes.sample(5)).depth
    found = pixels(depth_picture(depth))
    assert np.array_equal(found[:, :, 1], np.round(255 * depth)) and found.std() > 20
    assert (pixels(depth_picture(np.full((3, 4), 0.5))) == 128).all()


@pytest.mark.parametrize(
    "depth", [np.full((2, 2), 1.01), np.full((2, 2), -0.01), np.full((2, 2), np.nan), np.full((2, 2), np.inf),
              np.zeros((2, 2), int), np.zeros((2, 2, 1)), np.zeros((0, 2))],
)  # fmt: skip
def test_depth_is_refused(depth):
    refused(lambda: depth_picture(depth), "Depth must")


@pytest.fixture(scope="module")
def estimators(tmp_path_factory):
    """{type: folder} of tiny networks with random weights, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    neck = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5]}
    dpt = transformers.DPTConfig(
        **small, **neck, image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3], is_hybrid=False
    )
    dino = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    anything = transformers.DepthAnythingConfig(
        backbone_config=dino, patch_size=14, reassemble_hidden_size=16, head_hidden_size=8, **neck
    )
    glpn = transformers.GLPNConfig(
        hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8
    )
    models = {
        "metric": transformers.DepthAnythingForDepthEstimation(
            transformers.DepthAnythingConfig.from_dict(
                anything.to_dict() | {"depth_estimation_type": "metric", "max_depth": 20}
            )
        ),
        "dpt": transformers.DPTForDepthEstimation(dpt),
        "depth_anything": transformers.DepthAnythingForDepthEstimation(anything),
        "glpn": transformers.GLPNForDepthEstimation(glpn),
    }
    size = {"height": 56, "width": 56}
    folders = {}
    for kind, model in models.items():
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():  # as initialised, they predict the same everywhere, up to 1e-10
                parameter.normal_(0.1, 0.3)
        folders[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folders[kind])
        if kind == "glpn":
            transformers.GLPNImageProcessorPil().save_pretrained(folders[kind])
        else:
            transformers.DPTImageProcessorPil(size=size).save_pretrained(folders[kind])
    return folders


def predicted(folder, photo):
    """What the network says itself, without `pipeline`: (H, W), resized."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    x = AutoImageProcessor.from_pretrained(folder)(photo, return_tensors="pt")
    with torch.no_grad():
        depth = AutoModelForDepthEstimation.from_pretrained(folder)(**x).predicted_depth[:, None]
    return torch.nn.functional.interpolate(depth, (photo.height, photo.width), mode="bicubic")[0, 0].numpy()


@pytest.mark.parametrize("kind", ["dpt", "depth_anything", "metric", "glpn"])
def test_depth_of_a_photograph(kind, estimators, photos, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    photo = photos[0].resize((90, 60))
    near = predicted(estimators[kind], photo)
    if kind in ("glpn", "metric"):  # metres
        near = 1 / np.maximum(near, 0.1)
    wanted = np.round(255 * (near - near.min()) / (near.max() - near.min()))
    found = pixels(estimate_depth(photo, estimators[kind]))
    assert found.shape == (60, 90, 3) and found.min() == 0 and found.max() == 255 and found.std() > 2
    assert np.abs(found - wanted[:, :, None]).max() <= 1
    assert np.array_equal(pixels(prepare("depth", photo, estimator=str(estimators[kind]))), found)


def test_metres_nearer_than_a_hand_are_cut_off(monkeypatch):
    """1 / distance of one pixel at 0 would leave all others black."""
    from types import SimpleNamespace

    from ldm.conditions import depth

    metres = torch.tensor([[0.0, 0.05, 0.1, 0.2, 10.0]])
    network = (lambda picture: {"predicted_depth": metres}, SimpleNamespace(model_type="glpn"))
    monkeypatch.setattr(depth, "_depth_estimator", lambda folder: network)
    found = pixels(estimate_depth(Image.new("RGB", (5, 1)), "anywhere"))
    assert found[0, :, 0].tolist() == [255, 255, 255, round(255 * (5 - 0.1) / (10 - 0.1)), 0]


def test_a_constant_prediction_is_no_depth(estimators, photos, tmp_path):
    from transformers import AutoImageProcessor, DPTForDepthEstimation

    model = DPTForDepthEstimation.from_pretrained(estimators["dpt"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(estimators["dpt"]).save_pretrained(tmp_path)
    refused(lambda: estimate_depth(photos[0], tmp_path), "no depth", str(tmp_path))


def test_folders_that_are_no_estimator(estimators, photos, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    refused(lambda: estimate_depth(photos[0], tmp_path), str(tmp_path), "config.json")
    refused(lambda: estimate_depth(photos[0], "Intel/dpt-large"), "Intel/dpt-large")  # a name on the hub: not fetched
    for path in estimators["dpt"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert pixels(estimate_depth(photos[0], tmp_path)).std() > 5
    weights = load_file(tmp_path / "model.safetensors")
    unread = {n for n in weights if "fusion_stage.layers.0.residual_layer1." in n}
    assert len(unread) == 4
    save_file({n: w for n, w in weights.items() if n not in unread}, tmp_path / "model.safetensors", {"format": "pt"})
    whole = pixels(estimate_depth(photos[0], estimators["dpt"]))
    assert np.array_equal(pixels(estimate_depth(photos[0], tmp_path)), whole)  # they really are never used
    save_file({n: w for n, w in weights.items() if "head" not in n}, tmp_path / "model.safetensors", {"format": "pt"})
    refused(lambda: estimate_depth(photos[0], tmp_path), "lacks", "head", str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    refused(lambda: estimate_depth(photos[0], tmp_path), "download it again")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")  # a pickle is not opened
    refused(lambda: estimate_depth(photos[0], tmp_path), "download it again")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused(lambda: estimate_depth(photos[0], tmp_path), "'bert'", "dpt")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(lambda: estimate_depth(photos[0], estimators["dpt"]), "transformers")


# ---------------------------------------------------------------------------------------------------- classes


def test_ade20ks_palette():
    """As mmsegmentation's list; it has 150 colours, of which two are the same: 6, road, and 48, skyscraper."""
    assert ADE20K.shape == (150, 3) and ADE20K.dtype == np.uint8
    colours = [tuple(colour) for colour in ADE20K.tolist()]
    assert colours[:4] == [(120, 120, 120), (180, 120, 120), (6, 230, 230), (80, 50, 50)]  # wall, building, sky, floor
    assert colours[4] == (4, 200, 3) and colours[12] == (150, 5, 61) and colours[20] == (0, 102, 200)  # tree person car
    assert colours[21] == (61, 230, 250) and colours[149] == (92, 0, 255)  # water, flag
    twice = [k for k, colour in enumerate(colours) if colours.count(colour) > 1]
    assert twice == [6, 48] and len(set(colours)) == 149
    assert hashlib.sha256(ADE20K.tobytes()).hexdigest()[:16] == "ce475c9151035eff"  # all of them, pinned
    assert not ADE20K.flags.writeable


def test_segmentation_colours_every_class(tmp_path):
    labels = np.arange(150).reshape(10, 15)
    assert np.array_equal(pixels(segmentation(labels)), ADE20K[labels])
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "labels.png")
    assert np.array_equal(pixels(prepare("segmentation", tmp_path / "labels.png")), ADE20K[labels])


def test_segmentation_refuses():
    refused(lambda: segmentation(np.array([[150]])), "150", "subtract 1")
    refused(lambda: segmentation(np.array([[3, -1]])), "-1")
    refused(lambda: segmentation(np.array([[0.0]])), "integers")
    refused(lambda: segmentation(Image.new("RGB", (4, 4))), "colours")


# ---------------------------------------------------------------------------------------------------- poses

BODY = [
    (150, 40), (150, 90), (110, 90), (90, 150), (80, 200), (190, 92), (215, 150), (230, 205), (125, 210), (120, 290),
    (118, 370), (175, 210), (178, 290), (185, 370), (135, 25), (165, 25), (118, 40), (182, 40),
]  # fmt: skip
WIDTH, HEIGHT = 300, 400


def drawn_by_opencv(people):
    """`draw_bodypose` of controlnet_aux, by the functions that it calls."""
    canvas = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for (a, b), colour in zip(LIMBS, OPENPOSE.tolist(), strict=False):
        for points in people:
            (x0, y0), (x1, y1) = points[a], points[b]
            angle = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
            size = (int(math.hypot(x0 - x1, y0 - y1) / 2), 4)
            corners = cv2.ellipse2Poly((int((x0 + x1) / 2), int((y0 + y1) / 2)), size, angle, 0, 360, 1)
            cv2.fillConvexPoly(canvas, corners, colour)
    canvas = (canvas * 0.6).astype(np.uint8)
    for joint, colour in enumerate(OPENPOSE.tolist()):
        for points in people:
            cv2.circle(canvas, tuple(map(int, points[joint])), 4, colour, thickness=-1)
    return canvas


def test_the_skeleton_is_openposes():
    assert len(JOINTS) == len(OPENPOSE) == 18 and len(LIMBS) == 17
    assert OPENPOSE[:3].tolist() == [[255, 0, 0], [255, 85, 0], [255, 170, 0]] and OPENPOSE[-1].tolist() == [255, 0, 85]
    named = [(JOINTS[a], JOINTS[b]) for a, b in LIMBS]
    assert named[0] == ("neck", "right shoulder") and named[3] == ("right elbow", "right wrist")
    assert named[12] == ("neck", "nose") and named[16] == ("left eye", "left ear")
    assert all(a.split()[0] == b.split()[0] for a, b in named if " " in a and " " in b)  # no limb crosses sides
    limb_seq = "2 3, 2 6, 3 4, 4 5, 6 7, 7 8, 2 9, 9 10, 10 11, 2 12, 12 13, 13 14, 2 1, 1 15, 15 17, 1 16, 16 18"
    assert ", ".join(f"{a + 1} {b + 1}" for a, b in LIMBS) == limb_seq  # the authors', counted from 1
    assert sorted({joint for limb in LIMBS for joint in limb}) == list(range(18))


def test_joints_and_limbs_have_their_colours():
    found = pixels(pose([BODY], WIDTH, HEIGHT))
    assert found.shape == (HEIGHT, WIDTH, 3)
    for (x, y), colour in zip(BODY, OPENPOSE.tolist(), strict=True):
        assert found[y, x].tolist() == colour
        assert found[y, x - 4].tolist() == colour and found[y + 4, x].tolist() == colour  # radius 4
    for (a, b), colour in zip(LIMBS, OPENPOSE.tolist(), strict=False):
        x, y = (BODY[a][0] + BODY[b][0]) // 2, (BODY[a][1] + BODY[b][1]) // 2
        assert found[y, x].tolist() == [int(0.6 * c) for c in colour]
    assert 0.02 < (found.max(2) > 0).mean() < 0.2


@pytest.mark.parametrize("shift", [0, 0.7])
def test_the_pose_is_opencvs_up_to_a_rim(shift):
    people = [[(x + shift, y - shift) for x, y in BODY], [(x * 0.6 + 100, y * 0.9) for x, y in BODY]]
    found, wanted = pixels(pose(people, WIDTH, HEIGHT)), drawn_by_opencv(people)
    apart = (found != wanted).any(axis=2)
    assert apart.sum() < 0.05 * (wanted.max(2) > 0).sum()
    inner = cv2.erode((wanted.max(2) > 0).astype(np.uint8), np.ones((3, 3)))
    outer = cv2.dilate((wanted.max(2) > 0).astype(np.uint8), np.ones((3, 3)))
    assert not found[outer == 0].any() and found[inner == 1].max(1).min() > 0


def test_unseen_keypoints_take_their_limbs_along():
    for joint in range(18):
        seen = [None if k == joint else point for k, point in enumerate(BODY)]
        found = pixels(pose([seen], WIDTH, HEIGHT))
        x, y = BODY[joint]
        assert found[y, x].tolist() != OPENPOSE[joint].tolist()
        for a, b in LIMBS:
            x, y = (BODY[a][0] + BODY[b][0]) // 2, (BODY[a][1] + BODY[b][1]) // 2
            assert found[y, x].any() == (joint not in (a, b))
    assert not pixels(pose([[None] * 18], 20, 30)).any() and pose([], 20, 30).size == (20, 30)


def test_a_pose_may_reach_over_the_edge():
    assert np.array_equal(
        pixels(pose([np.array(BODY, np.float32)], 160, 200)), pixels(pose([BODY], 300, 400))[:200, :160]
    )
    assert pixels(pose([[(x - 100.5, y) for x, y in BODY]], 160, 200)).any()


@pytest.mark.parametrize(
    "people, width, height, words",
    [
        ([BODY[:17]], 300, 400, ["Person 0", "18 keypoints", "17"]),
        ([BODY, BODY + [None]], 300, 400, ["Person 1", "19"]),
        ([BODY, None], 300, 400, ["Person 1", "None"]),
        ([[(math.nan, 3)] + BODY[1:]], 300, 400, ["nose", "nan"]),
        ([BODY[:4] + [(1, math.inf)] + BODY[5:]], 300, 400, ["right wrist of person 0"]),
        ([[(1, 2, 3)] + BODY[1:]], 300, 400, ["nose"]),
        ([[("1", "2")] + BODY[1:]], 300, 400, ["nose"]),
        ([[(True, 2)] + BODY[1:]], 300, 400, ["nose"]),
        ([[(1e9, 2)] + BODY[1:]], 300, 400, ["nose", "16384"]),
        ([["ab"] + BODY[1:]], 300, 400, ["nose"]),
        ("people", 300, 400, ["list"]),
        (7, 300, 400, ["list"]),
        ([], 0, 400, ["width"]),
        ([], 300, 1.5, ["1.5"]),
        ([], True, 400, ["True"]),
        ([], 300, 10**9, ["16384"]),
    ],
)
def test_poses_are_refused(people, width, height, words):
    refused(lambda: pose(people, width, height), *words)


def test_poses_in_files(tmp_path):
    path = tmp_path / "pose.json"
    fields = {"width": WIDTH, "height": HEIGHT, "people": [BODY[:-1] + [None]]}
    path.write_text(json.dumps(fields))
    wanted = pixels(pose([BODY[:-1] + [None]], WIDTH, HEIGHT))
    assert np.array_equal(pixels(read_pose(path)), wanted) and wanted.any()
    assert np.array_equal(pixels(prepare("pose", str(path))), wanted)
    path.write_text(json.dumps({"width": 3, "people": []}))
    refused(lambda: read_pose(path), str(path), "height")
    path.write_text(json.dumps(fields | {"canvas": 1}))
    refused(lambda: read_pose(path), "canvas")
    path.write_text("[1, 2]")
    refused(lambda: read_pose(path), "object")
    path.write_text("{")
    refused(lambda: read_pose(path), "JSON")
    refused(lambda: read_pose(tmp_path / "none.json"), "does not exist")
    refused(lambda: read_pose(np.zeros(3)), "path")


# ---------------------------------------------------------------------------------------------------- tensors


def test_the_tensor_lies_in_0_1(photos):
    x = to_tensor(photos[1])
    assert x.shape == (1, 3, 128, 128) and x.dtype == torch.float32 and x.is_contiguous()
    assert torch.equal((255 * x[0]).round().byte(), torch.from_numpy(np.array(photos[1])).permute(2, 0, 1))
    assert to_tensor(Image.new("RGB", (2, 3), "white")).eq(1).all()
    check_range(x)
    check_range(torch.tensor([0.0, 1.0], dtype=torch.float16))


@pytest.mark.parametrize(
    "values, words",
    [
        ([-1.0, 1.0], ["[-1, 1]", "(x + 1) / 2"]),
        ([-0.1, 0.5], ["[-1, 1]"]),
        ([0.0, 255.0], ["0..255", "divide"]),
        ([0.0, 1.01], ["1.01"]),
        ([-3.0, 200.0], ["-3", "bring it"]),
        ([0.0, math.nan], ["NaN"]),
        ([0.0, math.inf], ["infinity"]),
        ([], ["empty"]),
    ],
)
def test_other_ranges_are_refused(values, words):
    refused(lambda: check_range(torch.tensor(values)), *words)
    refused(lambda: check_range(torch.tensor([0, 255], dtype=torch.uint8)), "uint8", "255")


# ---------------------------------------------------------------------------------------------------- doubts


def inverted(image):
    return Image.fromarray(255 - np.asarray(image))


def right(kind, photo, seed):
    """A picture as the network of that kind knows it."""
    if kind == "depth":
        return depth_picture(scenes.render(scenes.sample(seed)).depth)
    if kind == "segmentation":
        depth = scenes.render(scenes.sample(seed)).depth
        return segmentation((depth * 149).astype(int))
    if kind == "pose":
        return pose([BODY], WIDTH, HEIGHT)
    return {"canny": canny, "scribble": scribble}[kind](photo)


@pytest.mark.parametrize("kind", CONDITIONS)
def test_no_doubt_about_what_is_right(kind, photos):
    for seed, photo in zip(SEEDS, photos, strict=True):
        image = right(kind, photo, seed)
        assert doubts(kind, image) == []
        smaller = image.resize((image.width // 2, image.height // 2), Image.Resampling.NEAREST)
        assert doubts(kind, smaller) == []


@pytest.mark.parametrize("kind", CONDITIONS)
def test_a_photograph_is_doubted_as_any_condition(kind, photos):
    for photo in photos:
        (sentence,) = doubts(kind, photo)
        assert sentence.endswith(".") and "\n" not in sentence
        assert kind == "depth" or doubts(kind, photo.convert("L"))


@pytest.mark.parametrize("kind", ["canny", "scribble"])
def test_doubts_about_edges(kind, photos):
    for photo in photos:
        lines = right(kind, photo, 0)
        assert "invert" in doubts(kind, inverted(lines))[0]
        assert f"pass it through {kind}" in doubts(kind, photo)[0]
        assert doubts(kind, lines.resize((256, 256), Image.Resampling.BICUBIC)) == []
    assert "no edge" in doubts(kind, Image.new("RGB", (64, 64)))[0]


def test_doubts_about_depth(photos):
    assert "coloured" in doubts("depth", photos[0])[0]
    assert "same everywhere" in doubts("depth", Image.new("L", (64, 64), 99))[0]
    tinted = np.array(right("depth", None, 3))
    tinted[0, :5, 0] = 255  # a few pixels are no colour
    assert doubts("depth", tinted) == []


def test_doubts_about_classes(tmp_path):
    good = right("segmentation", None, 3)
    block = np.repeat(np.repeat(np.array([[4, 12], [20, 2]]), 64, axis=0), 64, axis=1)
    smooth = segmentation(block).resize((160, 160), Image.Resampling.BICUBIC)
    strange = ~(pixels(smooth)[:, :, None] == ADE20K).all(axis=3).any(axis=2)
    assert 0.01 < strange.mean() < 0.05 and doubts("segmentation", smooth) == []  # at borders alone
    assert "PNG" in doubts("segmentation", Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (20, 1))))[0]
    assert "indices" in doubts("segmentation", np.tile(np.arange(150, dtype=np.uint8), (20, 1)))[0]
    good.save(tmp_path / "a.jpg", quality=60)
    assert "PNG" in doubts("segmentation", tmp_path / "a.jpg")[0]
    assert doubts("segmentation", Image.new("RGB", (64, 64), (120, 120, 120))) == []  # all wall


def test_doubts_about_poses():
    assert "nobody" in doubts("pose", Image.new("RGB", (64, 64)))[0]
    drawn = pose([BODY], WIDTH, HEIGHT)
    assert "not mostly black" in doubts("pose", inverted(drawn))[0]
    assert "no colours" in doubts("pose", drawn.convert("L"))[0]


@pytest.mark.parametrize("kind", ["canny", "scribble"])
def test_edges_need_no_edges_drawn(kind, photos):
    for photo in photos:
        assert already_processed(kind, photo) == already_processed(kind, photo.convert("L")) == []
        for done in (canny(photo), inverted(canny(photo)), scribble(photo)):
            (sentence,) = already_processed(kind, done)
            assert kind in sentence and sentence.endswith(".")
    assert already_processed("depth", canny(photos[0])) == []


# ---------------------------------------------------------------------------------------------------- all of them


def test_prepare(photos):
    photo = photos[2]
    assert np.array_equal(pixels(prepare("canny", photo)), pixels(canny(photo)))
    assert np.array_equal(pixels(prepare("canny", photo, low=5, high=50)), pixels(canny(photo, 5, 50)))
    assert np.array_equal(pixels(prepare("canny", photo, low=0)), pixels(canny(photo, 0, 200)))  # 0 is a number, too
    assert not np.array_equal(pixels(canny(photo, 0, 200)), pixels(canny(photo)))
    assert np.array_equal(pixels(prepare("scribble", photo)), pixels(scribble(photo)))
    refused(lambda: prepare("cany", photo), "'cany'", "Did you mean 'canny'?")
    refused(lambda: doubts("cany", photo), "Did you mean 'canny'?")
    refused(lambda: prepare("scribble", photo, low=3), "low", "canny")
    refused(lambda: prepare("canny", photo, estimator="x"), "depth")
    refused(lambda: prepare("depth", photo), "estimator")


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        parser = Parser(prog="ldm")
        condition.add(parser.add_subparsers())
        args = parser.parse_args(["condition", *map(str, words)])
        assert isinstance(args, argparse.Namespace)
        args.run(args)
        return capsys.readouterr()

    return run


def test_the_command(cli, photos):
    photos[0].save("photo.png")
    out, err = cli("canny", "photo.png", "--out", "edges.png", "--low", 50, "--high", 150)
    with Image.open("edges.png") as image:
        assert np.array_equal(pixels(image), pixels(canny(photos[0], 50, 150))) and image.info == {}
    share = (pixels(canny(photos[0], 50, 150)) > 127).mean()
    assert out.splitlines()[0] == "edges.png" and err == ""
    assert "(1, 3, 128, 128) float32, from 0 to 1," in out and f"mean {share:.4f}" in out and f"{share:.2%}" in out
    refused(lambda: cli("canny", "photo.png", "--out", "edges.png"), "edges.png", "--overwrite")
    cli("canny", "photo.png", "--out", "edges.png", "--overwrite")
    with Image.open("edges.png") as image:
        assert np.array_equal(pixels(image), pixels(canny(photos[0])))
    out, err = cli("canny", "edges.png", "--out", "twice.png")
    assert len(err.splitlines()) == 1 and "already" in err
    photos[0].convert("RGBA").resize((64, 64)).rotate(45).save("turned.png")
    _, err = cli("scribble", "turned.png", "--out", "lines.png")
    assert len(err.splitlines()) == 1 and "white" in err  # said once, though the photograph is looked at twice


def test_the_command_for_other_kinds(cli, estimators, photos):
    with open("pose.json", "w") as file:
        json.dump({"width": 64, "height": 48, "people": []}, file)
    out, err = cli("pose", "pose.json", "--out", "pose.png")
    assert "(1, 3, 48, 64)" in out and "nobody" in err
    Image.fromarray(np.full((8, 8), 4, np.uint8)).save("classes.png")
    cli("segmentation", "classes.png", "--out", "colours.png")
    with Image.open("colours.png") as image:
        assert (pixels(image) == ADE20K[4]).all()
    photos[0].save("photo.png")
    cli("depth", "photo.png", "--out", "depth.png", "--estimator", estimators["dpt"])
    with Image.open("depth.png") as image:
        assert np.array_equal(pixels(image), pixels(estimate_depth(photos[0], estimators["dpt"])))


def test_the_command_refuses(cli, photos, capsys):
    photos[0].save("photo.png")
    refused(lambda: cli("canny", "photo.png", "--out", "edges.jpg"), ".png")
    refused(lambda: cli("canny", "photo.png", "--out", "no/edges.png"), "does not exist")
    refused(lambda: cli("canny", "none.png", "--out", "edges.png"), "none.png")
    out = ["photo.png", "--out", "a.png"]
    for words in (
        ["cany", *out], ["depth", *out], ["scribble", *out, "--low", "3"], ["canny", "photo.png"],
        ["canny", *out, "--estimator", "."], ["canny", *out, "--low", "x"],
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            cli(*words)
    err = capsys.readouterr().err
    assert "Did you mean 'canny'" in err and "are for canny alone" in err and "is for depth alone" in err


def test_the_commands_kinds_are_the_conditions():
    assert condition.KINDS == tuple(CONDITIONS)
    assert set(conditions.CONDITIONS.values()) >= {canny, scribble, segmentation}
