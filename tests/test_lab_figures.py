"""Figures for notebooks are what they say: the pixels that were given, on one scale, in small files; real models are
loaded where they are, and a line says where they are not.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import LDMError
from ldm.lab import figures
from ldm.lab.real import MODELS, real, real_controlnet, variable

RED, BLUE = (np.full((16, 16, 3), color, dtype=np.uint8) for color in ((200, 30, 30), (30, 30, 200)))


def share_of(shown, color, reach=30):
    """The share of a figure's pixels that are about this colour."""
    return (np.abs(np.asarray(shown.image).astype(int) - color).max(axis=-1) < reach).mean()


def test_pictures_of_every_kind_are_laid_out_with_their_colours():
    tensor = torch.from_numpy(RED).permute(2, 0, 1) / 127.5 - 1
    shown = figures.pictures([RED, Image.fromarray(BLUE), tensor], ["a", "b", "c"], heading="three")
    assert shown.mime == "image/jpeg" and repr(shown) == "<figure: three>"
    red, blue = share_of(shown, RED[0, 0]), share_of(shown, BLUE[0, 0])
    assert red > 1.7 * blue > 0.3
    bundle, more = shown._repr_mimebundle_()
    assert (
        more == {"image/jpeg": {"alt": "three"}}
        and bundle["text/plain"] == "<figure: three>"
        and bundle["image/jpeg"] == shown.data
    )


def test_rows_may_be_uneven_and_have_gaps():
    even = figures.pictures([[RED, BLUE], [RED, BLUE]], side=["one", "two"])
    uneven = figures.pictures([[RED, BLUE], [RED, None]], [["w", "x"], ["y", "z"]])
    assert share_of(uneven, BLUE[0, 0]) < 0.7 * share_of(even, BLUE[0, 0])


def test_a_tensor_that_is_no_picture_is_refused():
    with pytest.raises(LDMError, match=r"A tensor of shape \(4, 8, 8\) is no picture: give \(3, H, W\)"):
        figures.pictures([torch.zeros(4, 8, 8)])


def colors_of(shown):
    """The commonest colours that are neither paper nor ink."""
    pixels = np.asarray(shown.image).reshape(-1, 3)
    found, count = np.unique(pixels // 16, axis=0, return_counts=True)
    lively = np.ptp(found, axis=1) > 2
    return found[lively][count[lively].argsort()[::-1]]


def test_maps_share_one_scale():
    """The second map is a tenth of the first: on a scale of its own it would look the same."""
    ramp = np.linspace(0, 1, 16).reshape(4, 4)
    both = np.asarray(figures.heat([ramp, ramp / 10]).image).astype(float)
    width = both.shape[1]
    left, right = both[:, : int(0.4 * width)], both[:, int(0.5 * width) : int(0.85 * width)]
    assert left.max(axis=-1).std() > 1.2 * right[right.max(axis=-1) < 250].max(axis=-1).std()


def test_signed_maps_are_white_at_zero_blue_below_and_red_above():
    low, high = (colors_of(figures.heat([np.full((4, 4), v)], signed=True, bound=1.0))[0] for v in (-1.0, 1.0))
    assert low[2] > low[0] and high[0] > high[2]
    zero = np.asarray(figures.heat([np.zeros((4, 4))], signed=True, bound=1.0).image)
    assert (zero[60:120, 20:100] > 235).all()
    two = figures.channels(torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]))
    assert share_of(two, high * 16 + 8, reach=24) > 0.15


def test_a_map_over_a_picture_keeps_the_picture():
    halves = np.zeros((64, 64, 3), dtype=np.uint8)
    halves[:, 32:] = 255
    nothing = np.zeros((4, 4))
    over, plain = figures.heat([nothing], over=halves, bound=1.0), figures.heat([nothing], bound=1.0)
    assert over.mime == "image/jpeg" and plain.mime == "image/png"
    left, right = (np.asarray(over.image)[60:80, columns].mean() for columns in (slice(15, 45), slice(75, 105)))
    assert left + 50 < right


def test_a_plot_is_a_small_png_with_its_title_in_it(tmp_path):
    fig, (left, right) = figures.canvas(columns=2)
    left.plot([0, 1], [1, 0])
    right.plot([0, 1], [0, 1])
    assert not left.spines["top"].get_visible()
    figures.title(fig, "a very long sentence about what can be seen " * 4)
    text = fig._suptitle.get_text()
    assert "\n" in text and max(map(len, text.split("\n"))) <= 9.5 * fig.get_figwidth()
    shown = figures.show(fig, "two lines")
    assert shown.mime == "image/png" and len(shown.data) < 40_000 and shown.image.size == (720, 320)
    shown.save(tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size == (720, 320)


# ---------------------------------------------------------------------------------------------------- real models


def test_without_weights_a_cell_says_that_it_did_not_run(monkeypatch, capsys):
    for name in MODELS:
        monkeypatch.setenv(variable(name), "")
    assert real("sd15") is None
    said = capsys.readouterr().out
    assert said.startswith("NOT RUN: this cell needs Stable Diffusion 1.5") and "LDM_SD15," in said
    assert real_controlnet("sd15-canny", None) is None
    assert "LDM_SD15_CANNY," in capsys.readouterr().out
    assert real_controlnet("sd15-canny", object()) is None
    assert "LDM_SD15_CANNY," in capsys.readouterr().out


def test_with_weights_it_runs(monkeypatch, tmp_path):
    from ldm.loading import find_model
    from ldm.models.controlnet import ControlNet
    from ldm.pipeline import Pipeline

    monkeypatch.setenv("LDM_SD15", str(find_model("scenes")))
    monkeypatch.setenv("LDM_SD15_CANNY", str(find_model("scenes").with_name("scenes-canny")))
    pipe = real("sd15")
    assert real_controlnet("sd15-canny", None) is None
    assert isinstance(pipe, Pipeline) and isinstance(real_controlnet("sd15-canny", pipe), ControlNet)
    monkeypatch.setenv("LDM_SD15", str(tmp_path / "nowhere"))
    with pytest.raises(LDMError, match=r"LDM_SD15 names .*nowhere, which is no folder"):
        real("sd15")
    with pytest.raises(LDMError, match="The notebooks know no real model 'sd3': they know sd15"):
        real("sd3")


def test_the_poster_says_what_the_trace_holds(monkeypatch):
    """Two steps of a small picture: its numbers stand in the figure, and its pixels at the end of the road."""
    import ldm
    from ldm.lab import poster

    said = []
    monkeypatch.setattr(poster, "note", lambda ax, x, y, text, *more, **named: said.append(text))
    pipe = ldm.load("scenes")
    trace = pipe.trace("a red boat", seed=1, steps=2, sampler="ddim", width=96, height=64)
    names = ("1 tokenizer", "2 text encoder", "3 noise", "4 UNet", "5 sampler", "6 VAE decoder")
    shown = poster.poster(pipe, trace, {name: 10.0 * k for k, name in enumerate(names)})
    assert shown.mime == "image/png" and shown.image.width == 860
    assert said.count((1, 4, 8, 12)) == 3  # noise, the noise seen, the clean latent
    assert {"begin", "red", "boat", "end"} <= set(said) and pipe.tokenizer("a red boat").ids[0, 2].item() in said
    assert "2 times, at t = 501 to 1" in said
    assert any(str(text).startswith("(1, 77, 128)") and str(text).endswith("M weights, 10 ms") for text in said)
    assert any(str(text).startswith("(2, 4, 8, 12), without and with words; 5.5 M weights, 30 ms") for text in said)
    assert any(str(text).startswith("(1, 3, 64, 96)") for text in said)
