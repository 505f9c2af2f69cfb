"""The page of a run in a real browser: what is shown, pixel by pixel, is what the run's data say.

Needs Chromium and its driver (Debian: chromium, chromium-driver) and selenium. Without them the tests skip, unless
LDM_BROWSER=1 says that they must be there.
"""

import base64
import io
import json
import os
import shutil
import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model

import ldm
from ldm.lab import page, shown

PROGRAMS = ("chromium", "chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-device-scale-factor=1",
    "--force-color-profile=srgb",
)  # fmt: skip
STEPS = 4


def missing():
    """What is not there, in words; or nothing."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    try:
        import selenium  # noqa: F401
    except ImportError:
        lacking.append("selenium")
    return " and ".join(lacking)


if missing() and os.environ.get("LDM_BROWSER") != "1":
    reason = (
        f"The page can be tried only in a browser, and here there is no {missing()}: "
        "apt-get install chromium chromium-driver, and pip install selenium."
    )
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One Chromium for all tests."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_window_size(900, 1000)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of a tiny model, and pages of them."""
    folder = tmp_path_factory.mktemp("pages")
    pipe = ldm.load(tiny_model(folder / "tiny"))
    first = pipe.trace("a large red house, a tree", seed=3, steps=STEPS, width=256)  # a sheet of two rows
    other = pipe.trace("a red boat", seed=4, steps=2, sampler="ddim", guidance=1)
    page.write(first, folder / "one.html")
    page.write(first, folder / "two.html", other)
    still = pipe.trace("a large red house, a tree", image=first.result.x0, strength=0)
    page.write(first, folder / "still.html", still)
    parts = [page.show(each).html.partition("<script>") for each in (first, first, other)]
    places = "".join(place for place, _, _ in parts)
    scripts = "".join(start + script for _, start, script in reversed(parts))  # each finds its own place
    (folder / "several.html").write_text(f"<meta charset=utf-8><p id=x>{places}{scripts}", encoding="utf-8")
    return SimpleNamespace(folder=folder, first=first, other=other)


PIXELS = """
return [...arguments[0].querySelectorAll(`canvas[data-what="${arguments[1]}"]`)].map((canvas) => ({
  width: canvas.width, height: canvas.height,
  data: [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data],
}));
"""


class Stepper:
    """What a person does with a stepper, and sees."""

    def __init__(self, browser, host):
        self.browser, self.root = browser, host.shadow_root
        self.slider = self.one("input")
        self.words = self.all(".word")

    def one(self, selector):
        return self.root.find_element("css selector", selector)

    def all(self, selector):
        return self.root.find_elements("css selector", selector)

    def pixels(self, what):
        """The canvases of that kind, each (height, width, 3)."""
        found = self.browser.execute_script(PIXELS, self.root, what)
        return [np.array(each["data"], float).reshape(each["height"], each["width"], 4)[..., :3] for each in found]

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    @property
    def position(self):
        return int(self.slider.get_property("value"))

    def said(self, what):
        return [each.text for each in self.all(f'[data-what="{what}"]')]


@pytest.fixture
def opened(browser, runs):
    """Open a page: its steppers. At the end, nothing was loaded from elsewhere and the console is empty."""

    def open_page(name):
        browser.get((runs.folder / name).as_uri())
        hosts = browser.find_elements("css selector", "[data-ldm-stepper]")
        deadline = time.monotonic() + 10
        while not browser.execute_script("return arguments[0].every((host) => host.shadowRoot)", hosts):
            assert time.monotonic() < deadline, browser.get_log("browser")
        return [Stepper(browser, host) for host in hosts]

    for kind in ("browser", "performance"):
        browser.get_log(kind)
    yield open_page
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith(("file://", "data:")) for url in urls)


@pytest.fixture
def stepper(opened):
    return opened("one.html")[0]


def keys():
    from selenium.webdriver.common.keys import Keys

    return Keys


def ramp(stops):
    table = np.array([[int(stop[k : k + 2], 16) for k in (1, 3, 5)] for stop in stops], float)
    at = np.linspace(0, len(stops) - 1, 256)
    return np.stack([np.interp(at, range(len(stops)), table[:, c]) for c in range(3)], axis=1)


def greys(x, limit):
    return np.repeat((127.5 + x / limit * 127.5)[..., None], 3, axis=-1)


# ------------------------------------------------------------------------------------------------ one run


def test_every_step_shows_its_latent_its_pictures_and_its_maps(stepper, runs):
    trace, read = runs.first, shown.read(runs.first, 0)
    sheet, grid = np.asarray(Image.open(io.BytesIO(read.steps)).convert("RGB"), float), read.data["sheet"]
    latents = [step.x_before[0].numpy() for step in trace.steps] + [trace.result.x0[0].numpy()]
    limit, previews = np.abs(latents).max(), [step.x0 for step in trace.steps] + [trace.result.x0]
    stepper.slider.click()
    stepper.press(keys().HOME)
    for k, x in enumerate(latents):
        assert stepper.position == k
        for channel, found in zip(x, stepper.pixels("x"), strict=True):
            assert np.abs(found - greys(channel, limit)).max() < 2
        assert np.array_equal(stepper.pixels("preview")[0], np.asarray(trace.preview(previews[k])[0], float))
        left, top = k % grid["columns"] * grid["cell"][0], k // grid["columns"] * grid["cell"][1]
        cut = sheet[top : top + grid["picture"][1], left : left + grid["picture"][0]]
        assert np.abs(stepper.pixels("decode")[0] - cut).max() <= 4
        for word, found in zip(trace.words[0], stepper.pixels("word-map"), strict=True):
            maps = trace.maps(word).numpy()
            share = (maps.mean(0) if k == STEPS else maps[k]) / maps.max()
            assert np.abs(found - ramp(shown.MAGMA)[(share * 255).round().astype(int)]).max() < 8  # a place further
        stepper.press(keys().ARROW_RIGHT)
    assert stepper.position == STEPS  # there is no further


def test_the_row_is_that_of_the_schedule(stepper, runs):
    stepper.slider.click()
    stepper.press(keys().HOME, keys().ARROW_RIGHT)
    level = runs.first.steps[1].level
    found = [stepper.said(name)[0] for name in ("where", "i", "t", "alpha", "sigma", "seconds")]
    assert found[:3] == ["step 2 of 4", "1", f"{level.t:g}"]
    assert found[3:5] == [f"{level.alpha:.4f}", f"{level.sigma:.4f}"]
    assert float(found[5]) == pytest.approx(runs.first.seconds[1], abs=6e-4)
    assert stepper.slider.get_attribute("aria-valuetext") == "step 2 of 4"


def test_the_mouse_moves_the_slider(stepper):
    from selenium.webdriver.common.action_chains import ActionChains

    before = stepper.pixels("x")
    assert stepper.position == STEPS
    width = stepper.slider.size["width"]
    ActionChains(stepper.browser).move_to_element_with_offset(stepper.slider, 10 - width // 2, 0).click().perform()
    assert stepper.position == 0 and stepper.said("where") == ["step 1 of 4"]
    assert all(np.abs(a - b).max() > 20 for a, b in zip(before, stepper.pixels("x"), strict=True))


def test_a_word_lies_over_the_picture_and_over_the_steps(stepper, runs):
    trace, table = runs.first, ramp(shown.MAGMA)
    stepper.slider.click()
    stepper.press(keys().HOME, keys().ARROW_RIGHT)
    plain = stepper.pixels("decode")[0]
    for at in (3, 2):
        word = trace.words[0][at]
        stepper.words[at].click()
        assert [button.get_attribute("aria-pressed") for button in stepper.words].index("true") == at
        maps = trace.maps(word).numpy()
        share = Image.fromarray(maps[1] / maps.max()).resize(plain.shape[1::-1], Image.Resampling.BILINEAR)
        light = shown.SHADE + (1 - shown.SHADE) * plain @ [0.299, 0.587, 0.114] / 255
        expected = table[(np.asarray(share) * 255).round().clip(0, 255).astype(int)] * light[..., None]
        assert np.abs(stepper.pixels("decode")[0] - expected).max() < 8
        strip = stepper.pixels("strip")
        for found, own in zip(strip, [*maps, maps.mean(0)], strict=True):
            assert np.abs(found - table[(own / maps.max() * 255).round().astype(int)]).max() < 8
        assert [button.get_attribute("aria-current") for button in stepper.all(".strip button")].index("step") == 1
    stepper.all(".strip button")[2].click()
    assert stepper.position == 2 and stepper.words[2].get_attribute("aria-pressed") == "true"
    stepper.press(keys().ARROW_LEFT, keys().ESCAPE)
    assert stepper.position == 1 and np.array_equal(stepper.pixels("decode")[0], plain)
    assert not stepper.all(".strip") and {b.get_attribute("aria-pressed") for b in stepper.words} == {"false"}


def test_guidance_shows_its_channels_and_its_norm(stepper, runs):
    signs = ramp(["#123f6b", "#5b94c8", "#f4f3f1", "#e0965a", "#8a3a08"])
    norms = [(step.cond - step.uncond)[0].norm().item() for step in runs.first.steps]
    assert stepper.said("absent") == ["The run is over: no step is taken here."]
    stepper.slider.click()
    stepper.press(keys().HOME)
    for k, step in enumerate(runs.first.steps):
        pull = (step.cond - step.uncond)[0].numpy()
        places = (127.5 + pull / np.abs(pull).max() * 127.5).round().astype(int)
        for found, own in zip(stepper.pixels("guidance"), places, strict=True):
            assert np.abs(found - signs[own]).max() < 6
        assert stepper.one("svg.curve text.now").text == f"{norms[k]:#.3g}"
        sizes = [dot.get_attribute("r") for dot in stepper.all("svg.curve .dot")]
        assert sizes == ["5" if at == k else "3" for at in range(STEPS)] and stepper.said("absent") == [""]
        stepper.press(keys().ARROW_RIGHT)
    heights = [-float(dot.get_attribute("cy")) for dot in stepper.all("svg.curve .dot")]
    assert np.argsort(heights).tolist() == np.argsort(norms).tolist()


def test_it_plays_to_the_end_and_stops(stepper):
    button, seen = stepper.one(".play"), []
    button.click()
    assert button.get_attribute("aria-label") == "pause"
    deadline = time.monotonic() + 8
    while button.get_attribute("aria-label") == "pause":
        assert time.monotonic() < deadline
        seen.append(stepper.position)
    assert seen[0] == 0 and stepper.position == STEPS and all(0 <= b - a <= 1 for a, b in pairwise(seen))
    stepper.slider.click()
    middle = stepper.position
    stepper.press(" ")
    assert 0 < middle < STEPS and button.get_attribute("aria-label") == "pause"
    stepper.press(keys().HOME)  # whoever moves takes over
    assert button.get_attribute("aria-label") == "play" and stepper.position == 0


def test_every_part_is_reached_by_the_keyboard(stepper):
    stepper.browser.execute_script("document.body.tabIndex = -1; document.body.focus()")
    names = []
    for _ in range(len(stepper.words) + 2):
        stepper.press(keys().TAB)
        script = "return arguments[0].activeElement.getAttribute('aria-label')"
        names.append(stepper.browser.execute_script(script, stepper.root))
    assert [name.partition(":")[0] for name in names[:3]] == ["a", "large", "red"] and names[-2:] == ["play", "step"]


def test_the_dark_is_dark(stepper):
    light = stepper.one(".page").value_of_css_property("color")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    stepper.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        stepper.slider.click()
        stepper.press(keys().HOME)
        deadline = time.monotonic() + 5
        while "dark" not in stepper.one(".page").get_attribute("class"):
            assert time.monotonic() < deadline
        assert stepper.one(".page").value_of_css_property("color") != light
        assert np.median(stepper.pixels("guidance")[0]) < 120
    finally:
        stepper.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# ------------------------------------------------------------------------------------------------ several


def test_two_runs_side_by_side(opened, runs):
    stepper = opened("two.html")[0]
    data = [shown.read(run, 0).data for run in (runs.first, runs.other)]
    limit = max(max(each["x"]["scale"]) for each in data)
    pairs, sentence = page.pair(*(shown.levels_of(run) for run in (runs.first, runs.other)))
    assert stepper.said("paired") == [sentence] and len({b for _, b in pairs}) == 3
    assert stepper.said("differs")[0].startswith("A and B differ in seed (3 | 4), prompt, steps (4 | 2), sampler")
    stepper.slider.click()
    stepper.press(keys().HOME)
    for a, b in pairs:
        where = [f"step {k + 1} of {n}" if k < n else "the end" for k, n in ((a, STEPS), (b, 2))]
        assert stepper.said("where") == where
        latents = [
            run.steps[k].x_before if k < len(run) else run.result.x0 for run, k in ((runs.first, a), (runs.other, b))
        ]
        for x, found in zip([x for each in latents for x in each[0].numpy()], stepper.pixels("x"), strict=True):
            assert np.abs(found - greys(x, limit)).max() < 2
        stepper.press(keys().ARROW_RIGHT)
    assert "This run is not guided: there is nothing to subtract." in stepper.said("absent")
    before = stepper.pixels("decode")
    stepper.words[2].click()  # red, which both have
    assert [button.text.split()[0] for button in stepper.words if button.get_attribute("aria-pressed") == "true"] == [
        "red"
    ] * 2
    assert all(np.abs(a - b).max() > 20 for a, b in zip(before, stepper.pixels("decode"), strict=True))
    stepper.words[3].click()  # house, which B lacks
    assert np.array_equal(stepper.pixels("decode")[1], before[1])
    assert [each.text for each in stepper.all("p.strip")] == ["The other sentence has no such word."]


def test_a_run_without_maps_says_so_beside_one_that_has_them(opened):
    stepper = opened("still.html")[0]
    stepper.words[2].click()
    assert [each.text for each in stepper.all("p.strip")] == ["This run has no attention maps."]
    assert len(stepper.all(".strip button")) == STEPS + 1


def test_several_steppers_on_a_page_go_their_own_ways(opened, browser):
    one, same, other = opened("several.html")
    one.slider.click()
    one.press(keys().HOME)
    same.words[1].click()
    assert (one.position, same.position, other.position) == (0, STEPS, 2)
    assert not one.all(".strip") and same.all(".strip") and not other.all(".strip")
    assert browser.execute_script("return document.querySelectorAll('[id]').length") == 1  # none of ours
    assert browser.execute_script("return typeof DATA + typeof Stepper") == "undefinedundefined"


def test_without_scripts_the_pictures_stand_there(browser, runs, opened):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get((runs.folder / "one.html").as_uri())
        assert not browser.execute_script("return document.querySelector('[data-ldm-stepper]').shadowRoot !== null")
        shot = Image.open(io.BytesIO(base64.b64decode(browser.get_screenshot_as_base64()))).convert("RGB")
        images = browser.find_elements("css selector", "[data-ldm-stepper] img")
        assert len(images) == 2
        read = shown.read(runs.first, 0)
        for element, data in zip(images, (read.steps, read.words), strict=True):
            place, picture = element.rect, Image.open(io.BytesIO(data)).convert("RGB")
            box = [round(place[name]) for name in ("x", "y", "width", "height")]
            found = np.asarray(shot.crop((box[0], box[1], box[0] + box[2], box[1] + box[3])), float)
            expected = np.asarray(picture.resize((box[2], box[3]), Image.Resampling.BILINEAR), float)
            assert np.abs(found - expected).mean() < 12 and expected.std() > 20
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
