"""Published files: downloaded from one host after the other, or not at all."""

import gzip
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import published
from data.catalog import DataFile, NamedSet
from data.dataset import DataMissingError
from data.published import open_files

CONTENT = gzip.compress(bytes(range(256)) * 1000)


class Host(BaseHTTPRequestHandler):
    """What is at a path: the file, another one, its first bytes and no more, these and then a
    silence, nothing, or no answer.
    """

    def do_GET(self) -> None:
        first, *_ = self.path.split("/")[1:]
        if first == "silent":
            time.sleep(1)
        elif first == "none":
            self.send_error(404, "Not\x1b[31m here")
        else:
            body = {"good": CONTENT, "other": CONTENT[::-1]}.get(first, CONTENT[:500])
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(body)
            if first == "stuck":
                time.sleep(1)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def host(monkeypatch):
    """The address of a web server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def row_of(host: str, *places: str, name: str = "x.gz") -> NamedSet:
    """A set of one file, which these places have, or should have."""
    urls = tuple(f"{host}/{place}/{name}" for place in places)
    file = DataFile(f"A/raw/{name}", hashlib.md5(CONTENT).hexdigest(), urls)
    return NamedSet("A", 28, 1, ("a", "b"), (file,))


def download(row: NamedSet, folder: Path) -> bytes:
    with open_files(row, folder) as (file,):
        return file.read()


@pytest.mark.parametrize("before", [(), ("none",), ("other", "cut"), ("none", "other")])
def test_hosts_are_asked_in_turn_until_one_has_the_file(tmp_path, host, before):
    row = row_of(host, *before, "good", "silent")
    assert download(row, tmp_path) == CONTENT
    assert [path.name for path in (tmp_path / "A" / "raw").iterdir()] == ["x.gz"]
    assert download(row_of("http://127.0.0.1:9", "good"), tmp_path) == CONTENT  # it is there now


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("none", "Not[31m here"),  # without what would control a terminal
        ("other", "bytes with another MD5"),
        ("cut", "500 bytes with another MD5"),
        ("silent", ": timed out"),
        ("stuck", ": timed out"),
    ],
)
@pytest.mark.parametrize("there", ["", "A", "A/raw"])
def test_a_failed_download_leaves_nothing_behind(tmp_path, monkeypatch, host, place, reason, there):
    if place in ("silent", "stuck"):
        monkeypatch.setattr(published, "TIMEOUT", 0.2)
    folder = tmp_path / "data"
    if there:
        (folder / there).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataMissingError) as caught:
        download(row_of(host, place), folder)
    assert str(caught.value).endswith(reason), caught.value
    assert f"put what is missing of A into {folder}/A/raw: x.gz (MD5 " in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_has_come_of_several_files_stays(tmp_path, host):
    good, bad = row_of(host, "good"), row_of(host, "none", name="y.gz")
    with pytest.raises(DataMissingError, match=r"raw: y\.gz \(MD5 \w+\); it cannot"):
        download(good._replace(files=good.files + bad.files), tmp_path)
    assert [path.name for path in (tmp_path / "A" / "raw").iterdir()] == ["x.gz"]


def test_a_host_that_never_ends_is_left(tmp_path, monkeypatch, host):
    monkeypatch.setattr(published, "MAX_BYTES", len(CONTENT) - 1)
    with pytest.raises(DataMissingError, match="sends more than"):
        download(row_of(host, "good"), tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, host):
    (tmp_path / "A").write_text("a file")
    with pytest.raises(DataMissingError, match=r"x\.gz cannot be written: "):
        download(row_of(host, "good"), tmp_path)
