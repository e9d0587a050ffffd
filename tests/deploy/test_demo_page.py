"""The web page in a real Chromium: answered by the real server, and as one file."""

import io
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from demo_server import BLANK, NUMBER, SEVEN, Server
from PIL import Image
from shapes import draw_shape

from deploy import webpage
from deploy.predict import predict
from saving.checkpoint import PRETRAINED, load_checkpoint, save_checkpoint

webdriver = pytest.importorskip("selenium.webdriver", reason="the browser needs selenium")
pytest.importorskip("starlette", reason="the page needs starlette and uvicorn")
pytest.importorskip("uvicorn", reason="the page needs starlette and uvicorn")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
    pytest.mark.skipif(not PRETRAINED.is_file(), reason="no pretrained model"),
]
Point = tuple[float, float]


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{flag}")
    options.add_argument("--force-prefers-reduced-motion")  # examples are there at once
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    browser.set_window_size(1100, 1000)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    server = Server(tmp_path_factory.mktemp("page"), "--checkpoint", PRETRAINED)
    yield f"http://127.0.0.1:{server.port}/"
    server.kill()


@pytest.fixture(scope="module")
def file_url(tmp_path_factory) -> str:
    """The page that is one file, opened from the disk."""
    path = tmp_path_factory.mktemp("page") / "vit_mnist.html"
    path.write_text(webpage.build_page(*load_checkpoint(PRETRAINED)), encoding="utf-8")
    return path.as_uri()


class Page:
    """The page in the browser, and what a user does with it."""

    def __init__(self, browser: webdriver.Chrome, folder: Path) -> None:
        self.browser, self.folder, self.script = browser, folder, browser.execute_script

    def find(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def find_all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def wait(self, condition: Callable[[], object]) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 20, poll_frequency=0.02).until(lambda _: condition())

    def clear(self) -> None:
        self.find("#clear").click()

    def draw(self, *lines: list[Point], kind: str = "mouse") -> None:
        """Draw lines, points in percent of the canvas's side; wait for each line's answer."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        box = self.find("#drawing").rect
        for line in lines:
            answers = len(self.durations())
            actions = ActionBuilder(self.browser, mouse=PointerInput(kind, kind), duration=20)
            pointer = actions.pointer_action
            for i, (x, y) in enumerate(line):
                left, top = box["x"] + box["width"] * x / 100, box["y"] + box["height"] * y / 100
                pointer.move_to_location(round(left), round(top))
                if i == 0:
                    pointer.pointer_down()
            pointer.pointer_up()
            actions.perform()
            self.wait(lambda count=answers: len(self.durations()) > count)

    def durations(self) -> list[float]:
        """Milliseconds from each stroke's end until its answer was painted."""
        return self.script(
            "return performance.getEntriesByName('answer').map((entry) => entry.duration)"
        )

    def upload(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)
        self.find("#file").send_keys(str(self.folder / name))

    def command(self, name: str, **parameters: object) -> None:
        """A command of the Chrome DevTools Protocol."""
        self.browser.execute_cdp_cmd(f"Emulation.{name}", parameters)


@pytest.fixture(params=["url", "file_url"])
def page(request, chromium, tmp_path) -> Iterator[Page]:
    """The page, newly opened; afterwards: no error in its console, nothing asked of elsewhere."""
    url = request.getfixturevalue(request.param)
    chromium.get(url)
    page = Page(chromium, tmp_path)
    page.wait(lambda: page.text("#about"))
    yield page
    page.command("clearDeviceMetricsOverride")
    page.command("setEmulatedMedia", features=[])
    names = page.script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert bool(names) == (request.param == "url"), names
    assert all(name.startswith(url) for name in names), names
    log = chromium.get_log("browser")
    assert [entry for entry in log if "status of 4" not in entry["message"]] == []


served = pytest.mark.parametrize("page", ["url"], indirect=True)
one_file = pytest.mark.parametrize("page", ["file_url"], indirect=True)


def points(*corners: Point, count: int = 8) -> list[Point]:
    """Points along a polyline, as many on each side, as a hand would send them."""
    sides = [np.linspace(a, b, count) for a, b in pairwise(corners)]
    return [tuple(point) for point in np.concatenate(sides)]


def saved(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form, **({"compress_level": 1} if form == "PNG" else {}))
    return file.getvalue()


ONE, DRAWN_SEVEN = points((54, 18), (47, 82)), points((28, 22), (72, 20), (45, 82))
BAR = points((20, 50), (80, 50))
FOUR = points((28, 30), (12, 55), (38, 54)), points((33, 42), (30, 72))
TWO = points((60, 38), (68, 30), (80, 34), (80, 44), (60, 70), (86, 70))

# ----------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("kind", ["mouse", "touch"])
def test_a_one_and_a_seven_are_drawn_and_read(page, kind):
    name = {"mnist": "MNIST"}.get(load_checkpoint(PRETRAINED)[1]["dataset"], "digits")
    assert f" trained on {name}, " in page.text("#about")
    for digit, line in (("1", ONE), ("7", DRAWN_SEVEN)):
        page.draw(line, kind=kind)
        assert page.text("#digit") == digit
        assert page.text("#bars .winner").split()[0] == digit
        assert f"looks like {digit}" in page.find("#status").get_attribute("textContent")
        page.clear()
    assert "Draw a digit first" in page.text("#words")
    page.draw(points((50, 1), (46, 105)), kind=kind)  # beyond the edges: no printed line
    assert page.text("#digit") == "1"


def test_the_answer_stands_there_150_ms_after_a_stroke(page):
    def measure() -> float:
        page.script("performance.clearMeasures()")
        for _ in range(5):
            page.draw(ONE, BAR)
            page.clear()
        return median(page.durations())

    medians = [measure()]
    while medians[-1] >= 150 and len(medians) < 3:  # the machine may be busy with something else
        medians.append(measure())
    assert medians[-1] < 150, medians


@one_file
def test_a_page_that_is_one_file_can_answer_within_50_ms(page):
    for i in range(10):
        page.draw(points((54, 18 + i), (47, 82)))
        page.clear()
    assert min(page.durations()) < 50  # others that share the machine don't slow all of them down


def test_what_is_shown_is_what_pytorch_says_of_the_picture_received(page):
    """And the attention over it, with its legend."""
    page.draw(DRAWN_SEVEN)
    shown = page.script(
        "return ['received', 'attention'].map((id) => [...document.getElementById(id)"
        ".getContext('2d').getImageData(0, 0, 28, 28).data])"
    )
    received, attention = (np.array(pixels).reshape(28, 28, 4)[..., :3] for pixels in shown)
    assert received.max() > 200 and received[0].max() == 0
    np.testing.assert_array_equal(received[..., 0], received[..., 2])
    assert len(np.unique(attention.reshape(-1, 3), axis=0)) > 10
    low, high = (float(page.text(place).removesuffix(" %")) for place in ("#least", "#most"))
    assert 0 <= low < 100 / 16 < high <= 100
    shares = [float(row.text.split()[1]) for row in page.find_all("#bars li")]
    expected = predict(*of_one_image(received[..., 0])).probabilities[0]
    np.testing.assert_allclose(shares, 100 * expected, atol=0.15)


def of_one_image(pixels: np.ndarray) -> tuple:
    """What `predict` takes, of the pretrained model and one image (28, 28)."""
    model, checkpoint = load_checkpoint(PRETRAINED)
    return model, pixels.astype(np.uint8)[None, None], checkpoint


def test_undo_takes_back_the_last_stroke(page):
    page.draw(ONE, BAR)
    crossed = page.text("#words")
    page.find("#undo").click()
    page.wait(lambda: page.text("#words") not in (crossed, ""))
    assert page.text("#digit") == "1"
    page.find("#undo").click()
    assert "Draw a digit first" in page.text("#words") and not page.find("#undo").is_enabled()


def test_an_example_can_be_undone_and_drawn_on(page):
    page.find_all("#examples button")[4].click()
    page.wait(lambda: page.text("#digit") == "4" and page.script("return strokes.length") == 2)
    page.find("#undo").click()
    page.draw(FOUR[1])
    assert page.script("return strokes.length") == 2


def test_a_palm_beside_the_pen_draws_nothing(page):
    page.script(
        "drawing.setPointerCapture = () => {};"  # which knows real pointers alone
        "const { left, top } = drawing.getBoundingClientRect();"
        "const send = (type, pointerId, x) => drawing.dispatchEvent(new PointerEvent(type,"
        " { pointerId, isPrimary: true, button: 0, clientX: left + x, clientY: top + x }));"
        "send('pointerdown', 11, 50); send('pointerdown', 12, 200); send('pointermove', 12, 210);"
        "send('pointermove', 11, 60); send('pointerup', 12, 210); send('pointerup', 11, 60);"
    )
    assert page.script("return strokes.map((stroke) => stroke.length)") == [2]


@served
def test_the_page_comes_to_life_when_the_server_does(page):
    page.script(
        "const ask = fetch; let failures = 1; [classNames, words] = [[], {}];"
        "window.fetch = (path, ...more) =>"
        " path === 'model' && failures-- > 0 ? Promise.reject() : ask(path, ...more);"
        "showModel();"
    )
    page.wait(lambda: "Is demo.py still running?" in page.text("#words"))
    ready = page.script("return classNames.length")
    assert not ready
    page.script("strokes = [[[0.54, 0.18], [0.47, 0.82]]]; askAboutDrawing(0);")
    page.wait(lambda: page.text("#digit") == "1")


@served
def test_a_stroke_while_a_picture_is_opened_begins_a_drawing(page):
    page.script(
        "const open = createImageBitmap;"
        "window.createImageBitmap = (file) => new Promise((opened) => { window.go = () =>"
        " opened(open(file)); });"
    )
    page.upload("number.png", NUMBER)
    page.wait(lambda: page.script("return Boolean(window.go)"))
    page.draw(ONE)
    page.script("window.go();")
    page.browser.execute_async_script("setTimeout(arguments[0], 300)")
    assert page.text("#digit") == "1" and page.script("return upload === null")


@served
def test_a_picture_that_only_the_browser_can_read_is_sent_as_png(page):
    kinds = page.browser.execute_async_script(
        "const done = arguments[0], canvas = new OffscreenCanvas(30, 20); canvas.getContext('2d');"
        "canvas.convertToBlob().then(async (png) => {"
        " const image = await createImageBitmap(png);"
        " const avif = new File([png], 'x', { type: 'image/avif' });"
        " done([(await fitting(avif, image)).type, await fitting(png, image) === png]); });"
    )
    assert kinds == ["image/png", True]


def test_every_example_is_surely_read_as_what_it_shows(page):
    buttons = page.find_all("#examples button")
    assert len(buttons) == 10
    for digit, button in enumerate(buttons):
        button.click()
        page.wait(lambda digit=digit: page.text("#digit") == str(digit) and page.text("#took"))
        assert float(page.text("#bars .winner b").split()[0]) > 95, digit


@pytest.mark.slow
@pytest.mark.parametrize("size", [14, 40, 90])
def test_drawings_of_any_size_are_read(page, size):
    """The examples' strokes, drawn by hand with their longer side `size` percent of the pad's."""
    digits = page.script(
        "return [...document.querySelectorAll('#examples button')].map((button) =>"
        " [...button.querySelectorAll('path')].map((path) => points(path)))"
    )
    right = 0
    for digit, strokes in enumerate(digits):
        every = np.concatenate(strokes)
        low, high = every.min(axis=0), every.max(axis=0)
        scale = size / (high - low).max()
        page.draw(*((np.array(s[::4]) - (low + high) / 2) * scale + 50 for s in strokes))
        right += page.text("#digit") == str(digit)
        page.clear()
    assert right >= 9


@one_file
def test_pictures_are_for_the_server_and_the_page_that_is_one_file_says_so(page):
    assert not page.find("#upload").is_displayed() and page.text("#hint") == "Draw here"
    assert "photos of paper" in page.text("#photos") and "demo.py" in page.text("#photos")
    page.script(
        "const files = new DataTransfer(); files.items.add(new File(['x'], 'photo.jpg'));"
        "document.dispatchEvent(new DragEvent('drop', { dataTransfer: files }))"
    )
    page.wait(lambda: page.text("#digit") == "!")
    assert page.text("#words") == page.text("#photos")
    page.draw(ONE)
    assert page.text("#digit") == "1"


# ---------------------------------------------------------------------------------- several digits


def test_digits_of_a_number_are_framed_and_shown_one_by_one(page):
    page.draw(*FOUR, TWO)
    assert page.text("#digit") == "42"
    assert "looks like 42: 4 with" in page.find("#status").get_attribute("textContent")
    pad, frames = page.find("#pad").rect, page.find_all("#boxes i")
    corners = [[100 * (f.rect[xy] - pad[xy]) / pad["width"] for xy in "xy"] for f in frames]
    np.testing.assert_allclose(corners, [(12, 30), (60, 30)], atol=3)
    shown = []
    for i, name in enumerate("42"):
        page.find(f"#digit button:nth-child({i + 1})").send_keys(" ")  # by keyboard
        assert page.text("#words").startswith(f"Digit {i + 1} of 2: {name} with")
        assert page.text("#bars .winner").split()[0] == name
        assert [frame.get_attribute("aria-current") for frame in frames].index("true") == i
        shown.append(page.script("return document.getElementById('received').toDataURL()"))
    assert shown[0] != shown[1]
    page.find("#undo").click()  # the 2
    page.wait(lambda: page.text("#digit") == "4")
    assert not page.find_all("#boxes i")


@served
def test_a_frame_lies_over_its_digit_in_a_picture_and_a_click_selects_it(page):
    page.upload("number.png", NUMBER)  # 480x280: in the middle of the pad's height
    page.wait(lambda: page.text("#digit") == "71")
    pad, frame = page.find("#pad").rect, page.find("#boxes i:last-child")
    middle = [
        (frame.rect[start] + frame.rect[length] / 2 - pad[start]) / pad["width"]
        for start, length in (("x", "width"), ("y", "height"))
    ]
    assert middle == pytest.approx([345 / 480, (100 + 140) / 480], abs=0.01)
    assert frame.rect["height"] / pad["height"] == pytest.approx(200 / 480, abs=0.04)
    frame.click()
    assert page.text("#words").startswith("Digit 2 of 2")


@served
def test_what_may_be_no_digit_is_told(page):
    page.script(
        "const ask = window.fetch; window.fetch = async (...request) => {"
        " const answer = await (await ask(...request)).json();"
        " answer.digits.at(-1).may_be_no_digit = true;"
        " return { json: () => answer }; }"
    )
    page.draw(ONE)
    assert page.text("#words") == "This may be no digit" and page.text("#digit") == "1"
    assert page.text("#more").startswith("most like 1 with")
    assert "may be no digit" in page.find("#status").get_attribute("textContent")
    page.clear()
    page.draw(*FOUR, TWO)
    assert page.text("#words").startswith("Digit 1 of 2: 4 with")
    page.find("#digit button:last-child").click()
    assert page.text("#words") == "Digit 2 of 2 may be no digit"


# ---------------------------------------------------------------------------------------- pictures


@served
def test_pictures_are_read_or_refused_with_a_message(page):
    seven = Image.open(io.BytesIO(SEVEN))
    for name, content, digit, words in (
        ("seven.png", SEVEN, "7", "Probability"),
        ("text.png", b"This is no picture.\n", "!", "give a PNG or JPEG"),
        ("large.png", bytes(50 * 2**20), "!", "50 MB, expected at most 10 MB"),
        ("blank.png", BLANK, "!", "blank"),
        ("photo.png", saved(seven.resize((8_000, 8_000))), "7", "Probability"),  # scaled down
        ("seven.tif", saved(seven, "TIFF"), "7", "Probability"),
    ):
        page.upload(name, content)
        page.wait(lambda name=name, words=words: words in page.text("#words"))
        assert page.text("#digit") == digit, name
    # The browser cannot show the last one.
    assert "seven.tif" in page.text("#hint") and "cannot show" in page.text("#hint")
    page.clear()
    assert page.text("#digit") == "?" and page.text("#hint").startswith("Draw here")
    page.draw(ONE)
    assert page.text("#digit") == "1"


@served
@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("ink", [0, 255])
def test_transparent_ink_is_seen_in_either_mode(page, mode, ink):
    strokes = Image.open(io.BytesIO(SEVEN)).point(lambda value: 255 - value)
    picture = Image.new("LA", strokes.size, ink)
    picture.putalpha(strokes)
    page.command("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}])
    page.upload("seven.png", saved(picture))
    page.wait(lambda: page.text("#digit") == "7")
    on_ink, beside = page.script(
        "const canvas = document.getElementById('drawing'), side = canvas.width;"
        "const paper = getComputedStyle(document.getElementById('pad')).backgroundColor;"
        "const { data } = canvas.getContext('2d').getImageData(0, 0, side, side);"
        "return [[140, 60], [30, 30]].map(([x, y]) => {"
        " const i = 4 * (Math.round(y / 280 * side) * side + Math.round(x / 280 * side));"
        " return data[i + 3] ? data[i] : Number(paper.match(/\\d+/)[0]); })"
    )
    assert abs(on_ink - beside) > 100


# -------------------------------------------------------------------------------- other than digits


@pytest.fixture(scope="module")
def other_page(chromium, tmp_path_factory) -> Iterator[Callable]:
    """other_page(checkpoint) -> the page of a model that reads no digits."""
    servers = []

    def open_page(checkpoint: Path) -> Page:
        folder = tmp_path_factory.mktemp("other")
        servers.append(Server(folder, "--checkpoint", checkpoint))
        chromium.get(f"http://127.0.0.1:{servers[-1].port}/")
        page = Page(chromium, folder)
        page.wait(lambda: page.text("#about"))
        return page

    yield open_page
    for server in servers:
        server.kill()
    assert [e for e in chromium.get_log("browser") if "status of 4" not in e["message"]] == []


def test_a_model_of_photos_gets_pictures_and_no_drawings(other_page, photos, tmp_path):
    page = other_page(photos / "checkpoints" / "best_model.pt")
    assert page.text("h1") == "What is in the picture?" and "digit" not in page.text("body")
    assert not page.find("#examples").is_displayed() and not page.find("#undo").is_displayed()
    page.find("#drawing").click()
    assert page.text("#digit") == "?"
    shape = draw_shape("square", np.random.default_rng(0), (300, 200))
    page.upload("photo.png", saved(shape))
    page.wait(lambda: page.text("#took"))
    assert page.text("#digit") == "square" and page.text("#bars .winner").split()[0] == "square"
    assert not page.find_all("#boxes i")
    shares = [float(row.text.split()[1]) for row in page.find_all("#bars li")]
    assert len(shares) == 3 and shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.3)
    received, attention = page.script(
        "return ['received', 'attention'].map((id) => { const canvas = document.getElementById(id);"
        " return [canvas.width, canvas.height, ...canvas.getContext('2d')"
        ".getImageData(0, 0, canvas.width, canvas.height).data]; })"
    )
    assert received[:2] == attention[:2] == [32, 32]
    pixels = np.array(received[2:]).reshape(32, 32, 4)[..., :3]
    np.testing.assert_allclose(pixels[16, 16], shape.getpixel((150, 100)), atol=2)
    assert "32\N{MULTIPLICATION SIGN}32 pixels: its middle square" in page.text(".views")
    for width, height in ((360, 740), (740, 360)):
        page.command(
            "setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=True
        )
        assert page.script("return document.documentElement.scrollWidth") <= width
    page.command("clearDeviceMetricsOverride")
    page.clear()
    assert page.text("#words").startswith("Choose a picture") and page.text("#digit") == "?"


def test_a_model_of_letters_is_drawn_for(other_page, tmp_path):
    """Its classes are digits under other names."""
    names = {"class_names": list("ABCDEFGHIJ"), "dataset": "letters", "source": "letters"}
    save_checkpoint(tmp_path / "letters.pt", {**torch.load(PRETRAINED), **names})
    page = other_page(tmp_path / "letters.pt")
    assert page.text("h1") == "Draw a character" and "digit" not in page.text("body")
    assert not page.find("#examples").is_displayed()
    page.draw(ONE)
    assert page.text("#digit") == "B" and page.text("#bars .winner").split()[0] == "B"
    assert len(page.find_all("#bars li")) == 5
    page.clear()
    page.draw(*FOUR, TWO)
    assert page.text("#digit") == "EC" and page.text("#words").startswith("Character 1 of 2: E")


# ------------------------------------------------------------------------------------------ phones


@pytest.mark.parametrize(("width", "height"), [(360, 740), (740, 360)])
def test_a_phone_shows_it_all_without_scrolling_sideways(page, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
    page.command("setDeviceMetricsOverride", **metrics)
    page.draw(DRAWN_SEVEN)
    assert page.text("#digit") == "7"
    assert page.script("return document.documentElement.scrollWidth") <= width
    if width > height:  # held sideways it shows the answer beside the pad
        pad, tools, words = (page.find(place).rect for place in ("#pad", ".tools", "#details"))
        assert page.script("return [scrollY, document.body.scrollWidth]") == [0, 740]
        assert tools["y"] + tools["height"] <= 360
        assert words["x"] >= pad["x"] + pad["width"] and words["y"] + words["height"] <= 360
