"""Answers the web page of demo.py: its files, and what the network sees in a picture."""

import asyncio
import io
import socket
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from analysis.explain import attention_weights, patch_map, rollout
from analysis.words import PICTURE, words_for
from common.errors import UserError
from data.dataset import as_pictures
from deploy.digit_image import read_digits
from deploy.predict import describe, normalize, predict, prepare_picture
from deploy.webpage import PAGE, describe_model
from saving.checkpoint import image_shape
from vit_model import ViT

FILES = {f"/{name}": name for name in ("icon.svg", "script.js", "server.js", "style.css")}
FILES["/"] = "index.html"
# By itself Python asks the system, and some say that a script is text, which no browser runs.
MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
MEDIA_TYPES |= {".svg": "image/svg+xml"}
MAX_MB = 10  # of a picture; also in script.js, which does not send a larger one
MAX_DISCARDED_MB = 200  # read of a larger one, so that its sender gets the answer
MAX_SECONDS = 30  # to receive a picture
MAX_HEAD_SECONDS = 10  # to receive a request's head, from the connection or the last answer on
MAX_CONNECTIONS = 100
MAX_CONNECTIONS_OF_A_CLIENT = 50
HEADERS = {
    # The page loads nothing from elsewhere, and no other page may embed it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def make_app(model: ViT, checkpoint: dict[str, Any], hosts: Collection[str]) -> Starlette:
    """The page's files, `GET /model` and `POST /predict`.

    Args:
        model: in evaluation mode.
        checkpoint: as `load_checkpoint` returns it.
        hosts: names in the Host header of requests that are answered; ("*",) answers all. A page
            from elsewhere whose name was made to lead here (DNS rebinding) has another name.
    """
    worker = ThreadPoolExecutor(max_workers=1)  # one picture at a time
    blank = np.zeros((1, *image_shape(checkpoint)), np.uint8)
    worker.submit(answer_images, model, checkpoint, blank, [{}])  # the first is slow

    async def tell(_: Request) -> Response:
        return JSONResponse(describe_model(model, checkpoint))

    async def read(request: Request) -> Response:
        refuse_other_sites(request)
        picture = io.BytesIO(await receive(request))
        what = "drawing" if "drawing" in request.query_params else "picture"

        def work() -> dict[str, Any]:
            return answer(model, checkpoint, picture, f"{what} that you sent")

        try:
            return JSONResponse(await asyncio.get_running_loop().run_in_executor(worker, work))
        except UserError as error:
            raise HTTPException(422, str(error)) from None

    def file(name: str) -> FileResponse:
        return FileResponse(PAGE / name, media_type=MEDIA_TYPES[Path(name).suffix])

    routes = [Route(path, lambda _, name=name: file(name)) for path, name in FILES.items()]
    routes += [Route("/model", tell), Route("/predict", read, methods=["POST"])]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={
            HTTPException: lambda _, error: say(error.detail, error.status_code),
            ClientDisconnect: lambda *_: Response(status_code=400),  # nobody reads it
            Exception: lambda *_: say("the server failed; its terminal says how", 500),
        },
    )


def refuse_other_sites(request: Request) -> None:
    """Raise HTTPException if a browser says that the page of another site sends this request.

    Browsers send `Origin` with every POST, and `Sec-Fetch-Site` to this computer and over HTTPS.
    Other programs need not send either.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    foreign = origin is not None and origin.partition("://")[2] != request.headers.get("host")
    if foreign or site not in (None, "none", "same-origin"):
        raise HTTPException(403, "the page of another site may not ask; open this page itself")


def answer(model: ViT, checkpoint: dict[str, Any], source: BinaryIO, what: str) -> dict[str, Any]:
    """What the page shows of a picture, which messages call `what`. Raises UserError if it can't be
    read.

    Returns:
        Of a model that reads digits `size` of the picture, and `digits` in reading order (of
        letters `characters`), with `box`; of another one `pictures`, which is one. Each as
        `answer_images` gives it.
    """
    words = words_for(checkpoint)
    if words is PICTURE:
        image = prepare_picture(source, what, checkpoint)
        return {words.many: answer_images(model, checkpoint, image[None], [{}])}
    reading = read_digits(source, what, things=words.many)
    images = np.stack([digit.pixels for digit in reading.digits])[:, None]
    boxes = [{"box": digit.box} for digit in reading.digits]
    return {"size": reading.size, words.many: answer_images(model, checkpoint, images, boxes)}


def answer_images(
    model: ViT, checkpoint: dict[str, Any], images: np.ndarray, more: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What the page shows of images, uint8 (n, C, S, S).

    Returns:
        For each what `describe` gives, but with `probabilities` as a list, what is `more`, and with
        `received`, the rows of its pixels, of colour images each a list, and `attention`, the rows
        of the rollout over the patches.
    """
    predictions = predict(model, images, checkpoint)
    device = next(model.parameters()).device
    pixels = normalize(torch.from_numpy(images).to(device), checkpoint)
    attention = patch_map(rollout(attention_weights(model, pixels)), model)
    return [
        {
            **describe(probabilities, strange, checkpoint, **about),
            "probabilities": probabilities.tolist(),
            "received": image.tolist(),
            "attention": looked.tolist(),
        }
        for image, probabilities, strange, looked, about in zip(
            as_pictures(images), *predictions, attention, more, strict=True
        )
    ]


async def receive(request: Request) -> bytes:
    """A request's body. Raises HTTPException if it is too large, empty or too slow to come."""
    picture, size = bytearray(), 0
    try:
        async with asyncio.timeout(MAX_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= MAX_MB * 2**20:
                    picture += chunk
                elif size > MAX_DISCARDED_MB * 2**20:
                    break
    except TimeoutError:
        raise HTTPException(408, "the picture took too long to arrive; try again") from None
    if size > MAX_MB * 2**20:
        raise HTTPException(413, f"this file is too large: expected at most {MAX_MB} MB")
    if not size:
        raise HTTPException(400, "nothing was sent; expected the bytes of an image file")
    return bytes(picture)


def say(message: str, status: int) -> Response:
    """What went wrong, for the page to show."""
    return JSONResponse({"error": message}, status)


class Connection(H11Protocol):
    """uvicorn's connection, closed if it sends no request or its client opens too many.

    uvicorn alone waits for ever, and answers nobody while MAX_CONNECTIONS are open.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.opened = self.loop.time()
        self.address = self.client and self.client[0]
        self.wait_for_request()
        same = [other for other in self.connections if other.address == self.address]
        if len(same) > MAX_CONNECTIONS_OF_A_CLIENT:
            oldest = min(same, key=attrgetter("opened"))
            self.connections.discard(oldest)  # at once: uvicorn does so later
            oldest.transport.abort()

    def on_response_complete(self) -> None:
        self.wait_for_request()
        super().on_response_complete()

    def wait_for_request(self) -> None:
        """Close the connection unless another request has begun in MAX_HEAD_SECONDS."""

        def check(last: object) -> None:
            if self.cycle is last:  # no request has begun since then
                self.transport.abort()

        self.loop.call_later(MAX_HEAD_SECONDS, check, self.cycle)


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answer requests at a listening socket until Ctrl-C."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        headers=list(HEADERS.items()),
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    with suppress(KeyboardInterrupt):  # how a server is ended; all is closed by then
        uvicorn.Server(config).run(sockets=[listener])
