"""demo.py as a process of its own, for the tests of its answers and of its page."""

import http.client
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from conftest import ROOT
from PIL import Image, ImageDraw


class Server:
    """A started demo.py; `host` and `port` are those that it has printed."""

    def __init__(self, folder: Path, *flags: object) -> None:
        command = [sys.executable, ROOT / "src" / "demo.py", "--device", "cpu", "--port", 0, *flags]
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines = ""
        for line in self.process.stdout:
            lines += line
            if line.startswith("Ctrl-C"):
                break
        address = re.search(r"http://(.+):(\d+)/", lines)
        assert address, (lines, self.process.communicate())
        self.host, self.port = address[1], int(address[2])

    def request(self, method: str, path: str, body=None, headers=None) -> SimpleNamespace:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
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

    def press_ctrl_c(self) -> tuple[int, str, str]:
        """The exit status, and what it said from then on."""
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


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


BLANK = drawn()
SEVEN = drawn([(80, 60), (200, 60), (120, 230)])
NUMBER = drawn([(80, 60), (200, 60), (120, 230)], [(350, 50), (340, 230)], width=480)  # 71
