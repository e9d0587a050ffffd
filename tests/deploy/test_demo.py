"""The server of the web page, as a real process."""

import io
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_error_line
from demo_server import BLANK, NUMBER, SEVEN, Server, png
from PIL import Image
from shapes import draw_shape

import demo
from analysis.explain import attention_weights, patch_map, rollout
from analysis.words import DIGIT, PICTURE, PREPARED
from data.digits import load_digits
from deploy.digit_image import read_digits
from deploy.predict import predict, prepare_picture
from saving.checkpoint import PRETRAINED, load_checkpoint

pytest.importorskip("starlette", reason="the page needs starlette and uvicorn")
pytest.importorskip("uvicorn", reason="the page needs starlette and uvicorn")


@pytest.fixture(scope="module")
def checkpoint(request):
    if PRETRAINED.is_file():
        return PRETRAINED
    return request.getfixturevalue("trained") / "checkpoints" / "best_model.pt"


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    started = Server(tmp_path_factory.mktemp("demo"), "--checkpoint", checkpoint)
    yield started
    started.kill()


# ---------------------------------------------------------------------------------- what is served


def test_the_page_is_served_and_refers_to_nothing_outside(server):
    page = server.request("GET", "/")
    assert page.status == 200 and page.headers["Content-Type"].startswith("text/html")
    names = re.findall(r'(?:src|href)="([^"]+)"', page.content.decode())
    assert sorted(names) == ["icon.svg", "script.js", "server.js", "style.css"]
    for name in ("", *names):
        file = server.request("GET", f"/{name}")
        assert file.status == 200
        text = file.content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|[\"'(]//|@import|cookie|localStorage", text), name
        assert "default-src 'none'" in file.headers["Content-Security-Policy"]
        assert file.headers["X-Content-Type-Options"] == "nosniff"
        assert file.headers["Referrer-Policy"] == "no-referrer"
        assert file.headers["Set-Cookie"] is None


def test_a_drawing_is_read_as_by_python(server, checkpoint):
    model, about = load_checkpoint(checkpoint)
    reading = read_digits(io.BytesIO(NUMBER))
    images = np.stack([digit.pixels for digit in reading.digits])[:, None]
    expected = predict(model, images, about)
    (mean,), (std,) = about["normalization"]["mean"], about["normalization"]["std"]
    pixels = (torch.from_numpy(images / np.float32(255)) - mean) / std
    looked = patch_map(rollout(attention_weights(model, pixels)), model)
    answer = server.request("POST", "/predict", NUMBER).data
    assert answer["size"] == list(reading.size) == [480, 280] and len(answer["digits"]) == 2
    for i, (digit, read) in enumerate(zip(answer["digits"], reading.digits, strict=True)):
        np.testing.assert_allclose(digit["probabilities"], expected.probabilities[i], atol=1e-6)
        assert digit["prediction"] == about["class_names"][expected.probabilities[i].argmax()]
        assert digit["may_be_no_digit"] == expected.strange[i]
        assert digit["box"] == list(read.box)
        np.testing.assert_array_equal(digit["received"], read.pixels)
        np.testing.assert_allclose(digit["attention"], looked[i], atol=1e-6)


def test_the_model_is_described(server, checkpoint):
    model, about = load_checkpoint(checkpoint)
    assert server.request("GET", "/model").data == {
        "dataset": about["dataset"],
        "validation": about["best_acc"],
        "class_names": about["class_names"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "words": DIGIT._asdict(),
        "image_size": 28,
        "preparation": PREPARED["digit"],
    }


def test_a_model_of_photos_answers_pictures_as_by_python(tmp_path, photos):
    path = photos / "checkpoints" / "best_model.pt"
    model, about = load_checkpoint(path)
    picture = png(draw_shape("triangle", np.random.default_rng(3), (90, 70)))
    image = prepare_picture(io.BytesIO(picture), "x", about)
    expected = predict(model, image[None], about)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in about["normalization"].values())
    pixels = (torch.from_numpy(image[None] / np.float32(255)) - mean) / std
    looked = patch_map(rollout(attention_weights(model, pixels)), model)
    server = Server(tmp_path, "--checkpoint", path)
    try:
        told = server.request("GET", "/model").data
        assert told["class_names"] == about["class_names"] and told["image_size"] == 32
        assert told["words"] == PICTURE._asdict() and told["preparation"] == PREPARED["crop"]
        (answer,) = server.request("POST", "/predict", picture).data["pictures"]
        np.testing.assert_allclose(answer["probabilities"], expected.probabilities[0], atol=1e-6)
        assert answer["prediction"] == "triangle"
        assert answer["may_be_none_of_these"] == expected.strange[0]
        np.testing.assert_array_equal(answer["received"], np.moveaxis(image, 0, -1))
        np.testing.assert_allclose(answer["attention"], looked[0], atol=1e-6)
        refused = server.request("POST", "/predict", b"no picture")
        assert refused.status == 422 and "give a PNG or JPEG" in refused.data["error"]
    finally:
        server.kill()


def test_ten_clients_at_once_each_get_their_own_answer(server, checkpoint):
    model, about = load_checkpoint(checkpoint)
    pictures = [png(Image.fromarray(image[0].numpy())) for image in load_digits().test.images[:10]]
    read = [read_digits(io.BytesIO(picture)).digits[0].pixels for picture in pictures]
    expected = predict(model, np.stack(read)[:, None], about).probabilities
    assert len({tuple(row) for row in expected}) == 10

    def ask(picture: bytes) -> list[float]:
        return server.request("POST", "/predict", picture).data["digits"][0]["probabilities"]

    with ThreadPoolExecutor(10) as clients:
        answers = np.array(list(clients.map(ask, pictures * 5)))
    np.testing.assert_allclose(answers, np.tile(expected, (5, 1)), atol=1e-6)


# --------------------------------------------------------------------------------- what is refused


def too_large(size: str, limit: str) -> str:
    return (
        f"picture that you sent is too large: {size} pixels, expected at most {limit}; "
        "scale it down"
    )


@pytest.mark.parametrize(
    ("make_body", "status", "words"),
    [
        (lambda: bytes(50 * 2**20), 413, "at most 10 MB"),
        (lambda: (bytes(2**20) for _ in range(50)), 413, "at most 10 MB"),  # of unknown length
        (lambda: b"This is no picture.\n", 422, "give a PNG or JPEG"),
        (lambda: BLANK, 422, "blank"),
        (lambda: png(Image.new("1", (9_000, 9_000))), 422, too_large("9000x9000", "50 million")),
        (lambda: png(Image.new("1", (12_000, 9))), 422, too_large("12000x9", "10,000 a side")),
        (lambda: SEVEN[:200], 422, "damaged"),
        (lambda: b"", 400, "expected the bytes of an image"),
    ],
    ids=["50 MB", "50 MB in chunks", "text", "blank", "bomb", "wide", "half", "empty"],
)
def test_what_is_no_digit_gets_a_message_and_the_server_goes_on(server, make_body, status, words):
    answer = server.request("POST", "/predict", make_body())
    assert answer.status == status and words in answer.data["error"], answer.data
    assert "\n" not in answer.data["error"] and "BytesIO" not in answer.data["error"]
    assert server.request("POST", "/predict", SEVEN).status == 200


def test_a_message_says_whether_it_is_about_a_drawing_or_a_picture(server):
    for word in ("drawing", "picture"):
        message = server.request("POST", f"/predict?{word}", BLANK).data["error"]
        assert message.startswith(word) and "image" not in message, message


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        *((f"GET {path}", {}, 404) for path in ("/demo.py", "/../demo.py", "/%2e%2e/demo.py")),
        *((f"GET {path}", {}, 404) for path in ("/demo_page/", "/index.html", "/docs")),
        ("GET /predict", {}, 405),
        ("POST /", {}, 405),
        # A page from elsewhere whose name was made to lead here has another Host.
        ("GET /model", {"Host": "evil.example"}, 400),
        ("GET /model", {"Host": "localhost"}, 200),
        ("GET /model", {"Host": "localhost:{port}"}, 200),
        # The page of another site, or of another port of this computer, sends these.
        ("POST /predict", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("POST /predict?drawing", {"Sec-Fetch-Site": "same-site"}, 403),
        ("POST /predict", {"Origin": "http://evil.example"}, 403),
        ("POST /predict?drawing", {"Origin": "null"}, 403),
        ("POST /predict", {"Origin": "http://["}, 403),
        ("POST /predict", {"Sec-Fetch-Site": "same-origin", "Origin": "http://{host}:{port}"}, 200),
        ("POST /predict", {"Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_others_than_the_page_get_no_answer(server, request_line, headers, status):
    own = {"host": server.host, "port": server.port}
    headers = {name: value.format(**own) for name, value in headers.items()}
    answer = server.request(*request_line.split(), SEVEN, headers)
    assert answer.status == status
    assert status != 403 or "another site" in answer.data["error"]
    assert status != 404 or answer.data == {"error": "Not Found"}


def test_idle_connections_do_not_keep_others_waiting(server):
    idle = [socket.create_connection((server.host, server.port)) for _ in range(300)]
    begun = time.monotonic()
    assert server.request("GET", "/").status == 200
    assert server.request("POST", "/predict", SEVEN).status == 200
    assert time.monotonic() - begun < 5
    for connection in idle:
        connection.close()


@pytest.mark.slow
def test_a_request_that_never_becomes_whole_is_given_up(server):
    """Neither its head, though it grows, nor that of a second one in the same connection."""
    begun = time.monotonic()
    with ThreadPoolExecutor() as clients:
        first = (b"", f"GET /model HTTP/1.1\r\nHost: {server.host}\r\n\r\n".encode())
        for ended in clients.map(lambda whole: time_of_hang_up(server, whole), first):
            assert 5 < ended - begun < 20


def time_of_hang_up(server, first: bytes) -> float:
    """Send `first`, then a head without an end, a line a second, until the server hangs up."""
    with socket.create_connection((server.host, server.port)) as connection:
        connection.settimeout(1)
        connection.sendall(first + b"GET / HTTP/1.1\r\n")
        for _ in range(60):
            try:
                if not connection.recv(10_000):
                    break
            except TimeoutError:
                connection.sendall(b"X: y\r\n")
            except ConnectionError:
                break
    return time.monotonic()


# ------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "host",
    [
        "127.1",
        pytest.param("127.0.0.2", marks=pytest.mark.slow),
        pytest.param(socket.gethostname(), marks=pytest.mark.slow),
    ],
)
def test_the_address_that_is_printed_answers_and_leaves_no_trace(tmp_path, checkpoint, host):
    try:
        socket.create_server((host, 0)).close()
    except OSError:
        pytest.skip(f"{host} is no address of this computer")
    server = Server(tmp_path, "--host", host, "--checkpoint", checkpoint)
    assert server.host == host
    with socket.create_connection((host, server.port)) as connection:  # an upload broken off
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n"
        connection.sendall(head + b"half")
    assert server.request("POST", "/predict", SEVEN).status == 200
    assert server.press_ctrl_c() == (0, "ended\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--port {taken}", "port {taken} cannot be opened --port"),
        ("--host no-such-host.invalid", "--host no-such-host.invalid 127.0.0.1"),
        ("--host 192.0.2.1", "192.0.2.1 --host"),  # an address of nobody
        ("--port 65536", "65536 at most 65535"),
        ("--checkpoint none.pt", "none.pt --checkpoint"),
    ],
)
def test_wrong_usage_is_told_in_one_line(run, checkpoint, flags, words):
    with socket.create_server(("127.0.0.1", 0)) as other:
        flags, words = (text.format(taken=other.getsockname()[1]) for text in (flags, words))
        result = run(demo.main, "--checkpoint", checkpoint, *flags.split())
    assert_one_error_line(result, *words.split())
    assert result.err.count("127.0.0.1") <= 1, result.err


def test_without_the_extra_the_way_to_it_is_told(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "deploy.demo_app", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    assert_one_error_line(run(demo.main), "uvicorn", "launch.py demo.py")


def test_launch_installs_what_the_page_needs():
    spec = spec_from_file_location("launch", ROOT / "launch.py")
    launch = module_from_spec(spec)
    spec.loader.exec_module(launch)
    wanted = launch.read_requirements(launch.EXTRAS["demo.py"])
    assert {re.match(r"\w+", requirement)[0] for requirement in wanted} >= {"starlette", "uvicorn"}
    assert "demo.py" in launch.find_scripts() and "demo_app.py" not in launch.find_scripts()
