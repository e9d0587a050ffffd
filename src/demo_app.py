"""Answers the web page of demo.py: its files, and what the network makes of a picture."""

import asyncio
import io
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

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

from cli import UserError
from digit_image import read_digit
from explain import attention_weights, patch_map, rollout
from predict import predict
from vit_model import ViT, count_parameters

PAGE = Path(__file__).with_name("demo_page")
FILES = {"/": "index.html", "/script.js": "script.js", "/style.css": "style.css"}
FILES["/icon.svg"] = "icon.svg"
MAX_MB = 10  # of a picture; also in script.js, which spares the way
MAX_DISCARDED_MB = 200  # of a larger one read past, so that its sender gets to read the answer
MAX_SECONDS = 30  # to receive it
MAX_CONNECTIONS = 100
HEADERS = {
    # Nothing from elsewhere, on neither side.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def make_app(model: ViT, checkpoint: dict[str, Any], hosts: Sequence[str]) -> Starlette:
    """The page's files, `GET /model` and `POST /predict`.

    Args:
        model: in evaluation mode; it takes images of 1x28x28.
        checkpoint: as `load_checkpoint` returns it.
        hosts: names in a request's Host header that are answered. A page from elsewhere whose name
            was made to lead here (DNS rebinding) has another. ("*",) answers all.
    """
    worker = ThreadPoolExecutor(max_workers=1)  # one picture after the other: nothing is shared
    worker.submit(answer, model, checkpoint, np.zeros((28, 28), np.uint8))  # the first is slow

    async def describe(_: Request) -> Response:
        about = {"dataset": checkpoint["dataset"], "validation": checkpoint["best_acc"]}
        about["class_names"] = checkpoint["class_names"]
        return JSONResponse({**about, "parameters": count_parameters(model)})

    async def read(request: Request) -> Response:
        picture = await receive(request)

        def work() -> dict[str, Any]:
            return answer(model, checkpoint, read_digit(io.BytesIO(picture), name="that you sent"))

        try:
            return JSONResponse(await asyncio.get_running_loop().run_in_executor(worker, work))
        except UserError as error:
            raise HTTPException(422, str(error)) from None

    routes = [Route(path, page_file(name)) for path, name in FILES.items()]
    routes += [Route("/model", describe), Route("/predict", read, methods=["POST"])]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={
            HTTPException: lambda _, error: say(error.detail, error.status_code),
            ClientDisconnect: lambda *_: Response(status_code=400),  # nobody is there to read it
            Exception: lambda *_: say("this went wrong here; the terminal says how", 500),
        },
    )


def answer(model: ViT, checkpoint: dict[str, Any], image: np.ndarray) -> dict[str, Any]:
    """What the page shows of an image in MNIST's form, uint8 (28, 28).

    Returns:
        `probabilities` of the classes; `received`, the image's rows; `attention`, the
        rollout's rows over the patches.
    """
    probabilities = predict(model, image[None], checkpoint).probabilities[0]
    normalization = checkpoint["normalization"]
    pixels = torch.from_numpy(image).to(next(model.parameters()).device).view(1, 1, 28, 28) / 255
    normalized = (pixels - normalization["mean"]) / normalization["std"]
    attention = patch_map(rollout(attention_weights(model, normalized)), model)[0]
    return {
        "probabilities": probabilities.tolist(),
        "received": image.tolist(),
        "attention": attention.tolist(),
    }


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


def page_file(name: str):
    """The endpoint that serves one file of the page."""

    async def endpoint(_: Request) -> Response:
        return FileResponse(PAGE / name)

    return endpoint


def say(message: str, status: int) -> Response:
    """What went wrong, for the page to show."""
    return JSONResponse({"error": message}, status)


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answer requests at a listening socket until Ctrl-C."""
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        headers=list(HEADERS.items()),
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    with suppress(KeyboardInterrupt):  # the usual way to end a server; all is closed by then
        uvicorn.Server(config).run(sockets=[listener])
