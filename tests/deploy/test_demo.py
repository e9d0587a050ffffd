"""The web page: its server as a real process, and the page itself in a real Chromium."""

import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_error_line
from PIL import Image, ImageDraw

import demo
from analysis.explain import attention_weights, patch_map, rollout
from data.digits import load_digits
from deploy.digit_image import read_digits
from deploy.predict import predict
from saving.checkpoint import PRETRAINED, load_checkpoint

pytest.importorskip("starlette", reason="the page needs starlette and uvicorn")
pytest.importorskip("uvicorn", reason="the page needs starlette and uvicorn")


def start(folder: Path, *flags: object) -> SimpleNamespace:
    """Start demo.py; `lines` are what it printed until it was ready, `port` is where."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "src" / "demo.py", "--device", "cpu", *map(str, flags)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            break
    address = re.search(r"http://(.+):(\d+)/", "".join(lines))
    assert address, (lines, process.communicate())
    return SimpleNamespace(process=process, lines=lines, host=address[1], port=int(address[2]))


def end(process: subprocess.Popen) -> SimpleNamespace:
    """Press Ctrl-C; what it said after that, and its exit status."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    return SimpleNamespace(status=process.returncode, out=out, err=err)


@pytest.fixture(scope="module")
def checkpoint(request) -> Path:
    if PRETRAINED.is_file():
        return PRETRAINED
    return request.getfixturevalue("trained") / "checkpoints" / "best_model.pt"


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    started = start(tmp_path_factory.mktemp("demo"), "--port", 0, "--checkpoint", checkpoint)
    yield started
    started.process.kill()
    started.process.communicate()


def request(server, method: str, path: str, body=None, headers=None) -> SimpleNamespace:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return SimpleNamespace(
        status=response.status,
        headers=response.headers,
        content=content,
        data=json.loads(content) if "json" in response.headers["Content-Type"] else None,
    )


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def drawn(*lines: list[tuple[int, int]], width: int = 280) -> bytes:
    """A PNG file of black lines on white, 280 pixels high."""
    image = Image.new("L", (width, 280), 255)
    for line in lines:
        ImageDraw.Draw(image).line(line, fill=0, width=24, joint="curve")
    return png(image)


SEVEN = drawn([(80, 60), (200, 60), (120, 230)])
NUMBER = drawn([(80, 60), (200, 60), (120, 230)], [(350, 50), (340, 230)], width=480)  # 71


# ------------------------------------------------------------------------------------- the server


def test_the_page_is_served_and_refers_to_nothing_outside(server):
    page = request(server, "GET", "/")
    assert page.status == 200 and page.headers["Content-Type"].startswith("text/html")
    names = re.findall(r'(?:src|href)="([^"]+)"', page.content.decode())
    assert sorted(names) == ["icon.svg", "script.js", "style.css"]
    for name in ("", *names):
        file = request(server, "GET", f"/{name}")
        assert file.status == 200
        text = file.content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|[\"'(]//|@import|cookie|localStorage", text), name
        assert "default-src 'none'" in file.headers["Content-Security-Policy"]
        assert file.headers["X-Content-Type-Options"] == "nosniff"
        assert file.headers["Referrer-Policy"] == "no-referrer"
        assert file.headers["Set-Cookie"] is None


@pytest.mark.parametrize(
    "path", ["/demo.py", "/../demo.py", "/demo_page/", "/index.html", "/%2e%2e/demo.py", "/docs"]
)
def test_nothing_but_the_page_is_served(server, path):
    answer = request(server, "GET", path)
    assert answer.status == 404 and answer.data == {"error": "Not Found"}


def test_a_drawing_is_read_as_by_python(server, checkpoint):
    model, about = load_checkpoint(checkpoint)
    reading = read_digits(io.BytesIO(NUMBER))
    answer = request(server, "POST", "/predict", NUMBER).data
    assert answer["size"] == list(reading.size) == [480, 280]
    images = np.stack([digit.pixels for digit in reading.digits])
    expected = predict(model, images, about)
    mean, std = about["normalization"]["mean"], about["normalization"]["std"]
    pixels = (torch.from_numpy(images / np.float32(255)).unsqueeze(1) - mean) / std
    looked = patch_map(rollout(attention_weights(model, pixels)), model)
    assert len(answer["digits"]) == 2
    for i, (digit, read) in enumerate(zip(answer["digits"], reading.digits, strict=True)):
        np.testing.assert_allclose(digit["probabilities"], expected.probabilities[i], atol=1e-6)
        assert digit["prediction"] == about["class_names"][expected.probabilities[i].argmax()]
        assert digit["may_be_no_digit"] == expected.strange[i]
        assert digit["box"] == list(read.box)
        np.testing.assert_array_equal(digit["received"], read.pixels)
        np.testing.assert_allclose(digit["attention"], looked[i], atol=1e-6)


def test_the_model_is_described(server, checkpoint):
    model, about = load_checkpoint(checkpoint)
    description = request(server, "GET", "/model").data
    assert description["class_names"] == about["class_names"]
    assert description["dataset"] == about["dataset"]
    assert description["parameters"] == sum(p.numel() for p in model.parameters())


def test_ten_clients_at_once_each_get_their_own_answer(server, checkpoint):
    model, about = load_checkpoint(checkpoint)
    pictures = [png(Image.fromarray(image[0].numpy())) for image in load_digits().test.images[:10]]
    read = [read_digits(io.BytesIO(picture)).digits[0].pixels for picture in pictures]
    expected = predict(model, np.stack(read), about).probabilities
    assert len({tuple(row) for row in expected}) == 10

    def ask_often(picture: bytes) -> list[list[float]]:
        answers = [request(server, "POST", "/predict", picture).data for _ in range(5)]
        return [answer["digits"][0]["probabilities"] for answer in answers]

    with ThreadPoolExecutor(10) as clients:
        answers = np.array(list(clients.map(ask_often, pictures)))
    np.testing.assert_allclose(answers, np.repeat(expected[:, None], 5, axis=1), atol=1e-6)


def chunks(megabytes: int):
    return (bytes(2**20) for _ in range(megabytes))


@pytest.mark.parametrize(
    ("make_body", "status", "words"),
    [
        (lambda: bytes(50 * 2**20), 413, "at most 10 MB"),
        (lambda: chunks(50), 413, "at most 10 MB"),  # its length is not told before
        (lambda: b"This is no picture.\n", 422, "give a PNG or JPEG"),
        (lambda: drawn(), 422, "blank"),
        (lambda: png(Image.new("1", (9_000, 9_000))), 422, "too large"),
        (lambda: SEVEN[:200], 422, "damaged"),
        (lambda: b"", 400, "expected the bytes of an image"),
    ],
    ids=["50 MB", "50 MB in chunks", "text", "blank", "bomb", "half", "empty"],
)
def test_what_is_no_digit_gets_a_message_and_the_server_goes_on(server, make_body, status, words):
    answer = request(server, "POST", "/predict", make_body())
    assert answer.status == status and words in answer.data["error"], answer.data
    assert "\n" not in answer.data["error"] and "BytesIO" not in answer.data["error"]
    assert request(server, "POST", "/predict", SEVEN).status == 200


@pytest.mark.parametrize(
    ("size", "limit"), [((9_000, 9_000), "50 million"), ((12_000, 100), "10,000 a side")]
)
def test_a_picture_that_is_too_large_is_told_the_one_limit_that_it_exceeds(server, size, limit):
    message = request(server, "POST", "/predict", png(Image.new("1", size))).data["error"]
    assert message == (
        f"picture that you sent is too large: {size[0]}x{size[1]} pixels, "
        f"expected at most {limit}; scale it down"
    )


def test_a_message_says_whether_it_is_about_a_drawing_or_a_picture(server):
    for path, word in (("/predict?drawing", "drawing"), ("/predict?picture", "picture")):
        message = request(server, "POST", path, drawn()).data["error"]
        assert message.startswith(word) and "image" not in message, message


def test_other_methods_are_refused(server):
    assert request(server, "GET", "/predict").status == 405
    assert request(server, "POST", "/", b"x").status == 405


def test_a_page_from_elsewhere_whose_name_leads_here_gets_no_answer(server):
    for name, status in (
        ("evil.example", 400),
        ("localhost", 200),
        (f"localhost:{server.port}", 200),
    ):
        assert request(server, "GET", "/model", headers={"Host": name}).status == status


@pytest.mark.parametrize("path", ["/predict", "/predict?drawing"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),  # another port of this computer
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://{server}"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({}, 200),
    ],
)
def test_the_page_of_another_site_may_not_ask(server, path, headers, status):
    own = f"{server.host}:{server.port}"
    headers = {name: value.replace("{server}", own) for name, value in headers.items()}
    answer = request(server, "POST", path, SEVEN, headers)
    assert answer.status == status
    assert status == 200 or "another site" in answer.data["error"]


@pytest.mark.parametrize("count", [100, 300])
def test_idle_connections_do_not_keep_others_waiting(server, count):
    idle = [socket.create_connection((server.host, server.port)) for _ in range(count)]
    begun = time.monotonic()
    assert request(server, "GET", "/").status == 200
    assert request(server, "POST", "/predict", SEVEN).status == 200
    assert time.monotonic() - begun < 5
    for connection in idle:
        connection.close()


def test_a_request_that_never_becomes_whole_is_given_up(server):
    """Neither its head, though it grows, nor that of a second one in the same connection."""
    with ThreadPoolExecutor() as clients:
        begun = time.monotonic()
        for ended in clients.map(
            lambda first: seconds_until_closed(server, first), (b"", b"GET /model HTTP/1.1\r\n")
        ):
            assert 5 < ended - begun < 20


def seconds_until_closed(server, first: bytes) -> float:
    """Send a request, then a head without an end, a line a second; when the server hangs up."""
    with socket.create_connection((server.host, server.port)) as connection:
        connection.settimeout(1)
        head = f"Host: {server.host}\r\n\r\n".encode() if first else b""
        connection.sendall(first + head + b"GET / HTTP/1.1\r\n")
        for _ in range(60):
            try:
                if not connection.recv(10_000):
                    break
            except TimeoutError:
                connection.sendall(b"X: y\r\n")
            except ConnectionError:
                break
    return time.monotonic()


@pytest.mark.parametrize("host", ["127.0.0.2", "127.1", socket.gethostname()])
def test_the_address_that_is_printed_answers(tmp_path, checkpoint, host):
    try:
        socket.create_server((host, 0)).close()
    except OSError:
        pytest.skip(f"{host} is no address of this computer")
    server = start(tmp_path, "--host", host, "--port", 0, "--checkpoint", checkpoint)
    assert server.host == host
    assert request(server, "GET", "/model").status == 200
    assert end(server.process).status == 0


def test_an_upload_broken_off_leaves_no_trace(tmp_path, checkpoint):
    server = start(tmp_path, "--port", 0, "--checkpoint", checkpoint)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n"
        )
        connection.sendall(b"half")
    assert request(server, "POST", "/predict", SEVEN).status == 200
    ended = end(server.process)
    assert (ended.status, ended.out, ended.err) == (0, "ended\n", "")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- the command line


def test_a_taken_port_is_told_in_one_line(run, checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run(demo.main, "--port", port, "--checkpoint", checkpoint)
    assert_one_error_line(result, f"port {port}", "--port")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "no-such-host.invalid"], ["--host no-such-host.invalid", "127.0.0.1"]),
        (["--host", "192.0.2.1"], ["192.0.2.1", "--host"]),  # an address of nobody
        (["--port", "65536"], ["65536", "at most 65535"]),
        (["--checkpoint", "none.pt"], ["none.pt", "--checkpoint"]),
    ],
)
def test_wrong_usage_is_told_in_one_line(run, checkpoint, flags, words):
    assert_one_error_line(run(demo.main, "--checkpoint", checkpoint, *flags), *words)


def test_without_the_extra_the_way_to_it_is_told(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "demo_app", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    assert_one_error_line(run(demo.main), "uvicorn", "launch.py demo.py")


def test_launch_installs_what_the_page_needs():
    spec = spec_from_file_location("launch", ROOT / "launch.py")
    launch = module_from_spec(spec)
    spec.loader.exec_module(launch)
    wanted = launch.read_requirements(launch.EXTRAS["demo.py"])
    assert {re.match(r"\w+", requirement)[0] for requirement in wanted} >= {"starlette", "uvicorn"}
    assert "demo.py" in launch.find_scripts() and "demo_app.py" not in launch.find_scripts()


# ----------------------------------------------------------------------------- the page in Chromium

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def chromium():
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser needs selenium")
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
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


@pytest.fixture
def page(server, chromium):
    """The page, newly opened; afterwards: no error in its console, nothing asked of elsewhere."""
    url = f"http://127.0.0.1:{server.port}/"
    chromium.get(url)
    wait_for(chromium, lambda: text(chromium, "#about"))
    yield chromium
    resources = chromium.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert resources and all(name.startswith(url) for name in resources), resources
    errors = [
        entry for entry in chromium.get_log("browser") if "status of 4" not in entry["message"]
    ]
    assert errors == []


def find(page, selector: str):
    return page.find_element("css selector", selector)


def text(page, selector: str) -> str:
    return find(page, selector).text


def wait_for(page, condition) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 20, poll_frequency=0.02).until(lambda _: condition())


def draw(page, *lines: list[tuple[float, float]], kind: str = "mouse") -> None:
    """Draw lines over the canvas, points in percent of its side; wait for each line's answer."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    box = find(page, "#drawing").rect
    for line in lines:
        answers = len(durations(page))
        actions = ActionBuilder(page, mouse=PointerInput(kind, f"the {kind}"), duration=20)
        pointer = actions.pointer_action
        for i, (x, y) in enumerate(line):
            left, top = box["x"] + box["width"] * x / 100, box["y"] + box["height"] * y / 100
            pointer.move_to_location(round(left), round(top))
            if i == 0:
                pointer.pointer_down()
        pointer.pointer_up()
        actions.perform()
        wait_for(page, lambda count=answers: len(durations(page)) > count)


def durations(page) -> list[float]:
    """Milliseconds from each stroke's end until its answer was painted."""
    return page.execute_script(
        "return performance.getEntriesByName('answer').map((entry) => entry.duration)"
    )


def points(*corners: tuple[int, int], count: int = 8) -> list[tuple[float, float]]:
    """Points along a polyline, as many on each side, as a hand would send them."""
    sides = [np.linspace(a, b, count) for a, b in pairwise(corners)]
    return [tuple(point) for point in np.concatenate(sides)]


ONE, DRAWN_SEVEN = points((54, 18), (47, 82)), points((28, 22), (72, 20), (45, 82))


def test_the_data_set_has_its_name_as_people_write_it(page, checkpoint):
    name = {"mnist": "MNIST"}.get(load_checkpoint(checkpoint)[1]["dataset"], "digits")
    assert f" trained on {name}, " in text(page, "#about")


@pytest.mark.parametrize("kind", ["mouse", "touch"])
def test_a_one_and_a_seven_are_drawn_and_read(page, kind):
    for digit, line in (("1", ONE), ("7", DRAWN_SEVEN)):
        draw(page, line, kind=kind)
        assert text(page, "#digit") == digit
        assert text(page, "#bars .winner").split()[0] == digit
        assert f"looks like {digit}" in find(page, "#status").get_attribute("textContent")
        find(page, "#clear").click()
    assert "Draw a digit first" in text(page, "#words")


def test_the_answer_stands_there_150_ms_after_a_stroke(page):
    def measure() -> float:
        page.execute_script("performance.clearMeasures()")
        for _ in range(5):
            draw(page, ONE, points((20, 50), (80, 50)))
            find(page, "#clear").click()
        return median(durations(page))

    medians = [measure()]
    while medians[-1] >= 150 and len(medians) < 3:  # the machine may be busy with something else
        medians.append(measure())
    assert medians[-1] < 150, medians


def test_what_is_shown_is_what_the_server_says(page, server):
    """The picture received, the attention over it and its legend, the probabilities."""
    draw(page, DRAWN_SEVEN)
    shown = page.execute_script(
        "const pixels = (id) => [...document.getElementById(id).getContext('2d')"
        ".getImageData(0, 0, 28, 28).data];"
        "return [pixels('received'), pixels('attention')]"
    )
    received, attention = (np.array(pixels).reshape(28, 28, 4)[..., :3] for pixels in shown)
    assert received.max() > 200 and received[0].max() == 0
    np.testing.assert_array_equal(received[..., 0], received[..., 2])
    assert len(np.unique(attention.reshape(-1, 3), axis=0)) > 10
    low, high = (float(text(page, place).removesuffix(" %")) for place in ("#least", "#most"))
    assert 0 <= low < 100 / 16 < high <= 100
    shares = [float(row.text.split()[1]) for row in page.find_elements("css selector", "#bars li")]
    assert len(shares) == 10 and sum(shares) == pytest.approx(100, abs=0.6)


def test_a_stroke_beyond_the_edges_is_ink_and_no_printed_line(page):
    draw(page, points((50, 1), (46, 105)))
    assert text(page, "#digit") == "1"


def test_undo_takes_back_the_last_stroke(page):
    draw(page, ONE, points((20, 50), (80, 50)))
    crossed = text(page, "#words")
    find(page, "#undo").click()
    wait_for(page, lambda: text(page, "#words") not in (crossed, ""))
    assert text(page, "#digit") == "1"
    find(page, "#undo").click()
    assert "Draw a digit first" in text(page, "#words") and not find(page, "#undo").is_enabled()


def test_every_example_is_surely_read_as_what_it_shows(page, checkpoint):
    buttons = page.find_elements("css selector", "#examples button")
    assert len(buttons) == 10
    for digit, button in enumerate(buttons):
        button.click()
        wait_for(page, lambda digit=digit: text(page, "#digit") == str(digit))
        wait_for(page, lambda: text(page, "#took"))
        share = float(text(page, "#bars .winner b").split()[0])
        assert share > 95 or checkpoint != PRETRAINED, f"{digit} with {share} %"


@pytest.mark.parametrize("size", [14, 40, 90])
def test_drawings_of_any_size_are_read(page, size):
    """The examples' strokes, drawn by hand with their longer side `size` percent of the pad's."""
    digits = page.execute_script(
        "return [...document.querySelectorAll('#examples button')].map((button) =>"
        " [...button.querySelectorAll('path')].map((path) => points(path)))"
    )
    right = 0
    for digit, strokes in enumerate(digits):
        every = np.concatenate(strokes)
        low, high = every.min(axis=0), every.max(axis=0)
        scale = size / (high - low).max()
        lines = [(np.array(stroke[::4]) - (low + high) / 2) * scale + 50 for stroke in strokes]
        draw(page, *lines)
        right += text(page, "#digit") == str(digit)
        find(page, "#clear").click()
    assert right >= 9


FOUR = points((28, 30), (12, 55), (38, 54)), points((33, 42), (30, 72))
TWO = points((60, 38), (68, 30), (80, 34), (80, 44), (60, 70), (86, 70))


def test_digits_of_a_number_are_framed_and_shown_one_by_one(page):
    draw(page, *FOUR, TWO)
    assert text(page, "#digit") == "42"
    assert "looks like 42: 4 with" in find(page, "#status").get_attribute("textContent")
    pad, frames = find(page, "#pad").rect, page.find_elements("css selector", "#boxes i")
    places = [
        [100 * (frame.rect[side] - pad[side]) / pad["width"] for side in ("x", "y")]
        for frame in frames
    ]
    np.testing.assert_allclose(places, [(12, 30), (60, 30)], atol=3)
    received = "return document.getElementById('received').toDataURL()"
    shown = []
    for i, name in enumerate("42"):
        find(page, f"#digit button:nth-child({i + 1})").send_keys(" ")  # by keyboard
        assert text(page, "#words").startswith(f"Digit {i + 1} of 2: {name} with")
        assert text(page, "#bars .winner").split()[0] == name
        assert [frame.get_attribute("aria-current") for frame in frames].index("true") == i
        shown.append(page.execute_script(received))
    assert shown[0] != shown[1]
    find(page, "#undo").click()  # the 2
    wait_for(page, lambda: text(page, "#digit") == "4")
    assert not page.find_elements("css selector", "#boxes i")


def test_a_frame_lies_over_its_digit_in_a_picture_and_a_click_selects_it(page, tmp_path):
    (tmp_path / "number.png").write_bytes(NUMBER)  # 480x280: in the middle of the pad's height
    find(page, "#file").send_keys(str(tmp_path / "number.png"))
    wait_for(page, lambda: text(page, "#digit") == "71")
    pad, frame = find(page, "#pad").rect, find(page, "#boxes i:last-child")
    middle = [
        (frame.rect[start] + frame.rect[length] / 2 - pad[start]) / pad["width"]
        for start, length in (("x", "width"), ("y", "height"))
    ]
    assert middle == pytest.approx([345 / 480, (100 + 140) / 480], abs=0.01)
    assert frame.rect["height"] / pad["height"] == pytest.approx(200 / 480, abs=0.04)
    frame.click()
    assert text(page, "#words").startswith("Digit 2 of 2")


def test_what_may_be_no_digit_is_told(page):
    page.execute_script(
        "const ask = window.fetch; window.fetch = async (...request) => {"
        " const answer = await (await ask(...request)).json();"
        " answer.digits.at(-1).may_be_no_digit = true;"
        " return { json: () => answer }; }"
    )
    draw(page, ONE)
    assert text(page, "#words") == "This may be no digit" and text(page, "#digit") == "1"
    assert text(page, "#more").startswith("most like 1 with")
    assert "may be no digit" in find(page, "#status").get_attribute("textContent")
    find(page, "#clear").click()
    draw(page, *FOUR, TWO)
    assert text(page, "#words").startswith("Digit 1 of 2: 4 with")
    find(page, "#digit button:last-child").click()
    assert text(page, "#words") == "Digit 2 of 2 may be no digit"


def test_a_large_photo_is_scaled_down_before_it_is_sent(page, tmp_path):
    """One of 64 million pixels, which the server refuses."""
    photo = Image.open(io.BytesIO(SEVEN)).resize((8_000, 8_000))
    photo.save(tmp_path / "photo.png", compress_level=1)
    find(page, "#file").send_keys(str(tmp_path / "photo.png"))
    wait_for(page, lambda: text(page, "#digit") in ("7", "!"))
    assert text(page, "#digit") == "7", text(page, "#words")


def test_a_picture_that_the_browser_cannot_show_is_read_and_can_be_cleared(page, tmp_path):
    Image.open(io.BytesIO(SEVEN)).save(tmp_path / "seven.tif")
    find(page, "#file").send_keys(str(tmp_path / "seven.tif"))
    wait_for(page, lambda: text(page, "#digit") == "7")
    assert "seven.tif" in text(page, "#hint") and "cannot show" in text(page, "#hint")
    find(page, "#clear").click()
    assert text(page, "#digit") == "?" and text(page, "#hint").startswith("Draw here")


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("ink", [0, 255])
def test_transparent_ink_is_seen_in_either_mode(page, tmp_path, mode, ink):
    strokes = Image.open(io.BytesIO(SEVEN)).point(lambda value: 255 - value)
    picture = Image.new("LA", strokes.size, ink)
    picture.putalpha(strokes)
    picture.save(tmp_path / "seven.png")
    features = [{"name": "prefers-color-scheme", "value": mode}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        find(page, "#file").send_keys(str(tmp_path / "seven.png"))
        wait_for(page, lambda: text(page, "#digit") == "7")
        ink_and_paper = page.execute_script(
            "const canvas = document.getElementById('drawing');"
            "const paper = getComputedStyle(document.getElementById('pad')).backgroundColor;"
            "const side = canvas.width;"
            "const { data } = canvas.getContext('2d').getImageData(0, 0, side, side);"
            "return [[140, 60], [30, 30]].map(([x, y]) => {"
            " const i = 4 * (Math.round(y / 280 * side) * side + Math.round(x / 280 * side));"
            " return data[i + 3] ? data[i] : Number(paper.match(/\\d+/)[0]); })"
        )
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert abs(ink_and_paper[0] - ink_and_paper[1]) > 100, ink_and_paper


def test_files_are_read_or_refused_with_a_message(page, tmp_path):
    cases = {
        "seven.png": (SEVEN, "Probability"),
        "text.png": (b"This is no picture.\n", "give a PNG or JPEG"),
        "large.png": (bytes(50 * 2**20), "50 MB, expected at most 10 MB"),
        "blank.png": (drawn(), "blank"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        find(page, "#file").send_keys(str(tmp_path / name))
        wait_for(page, lambda words=words: words in text(page, "#words"))
    draw(page, ONE)  # and the page goes on
    assert text(page, "#digit") == "1"


def test_a_phone_shows_it_all_without_scrolling_sideways(page):
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        draw(page, DRAWN_SEVEN)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
        assert text(page, "#digit") == "7"
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_phone_held_sideways_shows_the_answer_beside_the_pad(page):
    metrics = {"width": 740, "height": 360, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        draw(page, DRAWN_SEVEN)
        pad, tools, words = (find(page, place).rect for place in ("#pad", ".tools", "#details"))
        assert page.execute_script("return [scrollY, document.body.scrollWidth]") == [0, 740]
        assert tools["y"] + tools["height"] <= 360
        assert words["x"] >= pad["x"] + pad["width"] and words["y"] + words["height"] <= 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
