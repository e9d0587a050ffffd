"""A web page to draw digits on, or to drop pictures on: what the network sees, where it looked."""

import common.startup  # noqa: F401 before PyTorch

from common import cli
from deploy.flags import parse_demo_args

if __name__ == "__main__":
    cli.check_flags(parse_demo_args)  # before PyTorch is imported, which takes seconds

import os
import socket
from ipaddress import ip_address

import torch

from common.device import choose_device
from common.errors import UserError
from deploy.predict import check_image_shape
from saving.checkpoint import find_checkpoint, load_checkpoint

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the address or the port can't be had."""
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except (socket.gaierror, UnicodeError):
        raise UserError(
            f"--host {host}: expected an address or a name of this computer, such as 127.0.0.1"
        ) from None
    except OSError as error:
        raise UserError(
            f"port {port} of {host} cannot be opened: {os.strerror(error.errno)}; "
            "give another --port, or a --host that is this computer"
        ) from None


def in_url(host: str) -> str:
    """A name or an address as a URL has it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def main() -> None:
    args = parse_demo_args()
    try:
        from deploy.demo_app import make_app, serve
    except ModuleNotFoundError as error:  # an extra, since the other scripts do without
        raise UserError(
            f"the page needs the package {error.name}: start it with python3 launch.py demo.py, "
            'which installs it, or run pip install ".[demo]" first'
        ) from None
    device = choose_device(args.device)
    path = find_checkpoint(args.checkpoint)
    model, checkpoint = load_checkpoint(path)
    check_image_shape(checkpoint, path)
    with open_socket(args.host, args.port) as listener:
        torch.set_num_threads(1)  # one image is too little work to share
        address, port = listener.getsockname()[:2]
        local = ip_address(address).is_loopback
        shown = "localhost" if ip_address(address).is_unspecified else in_url(args.host)
        names = {*LOOPBACK_NAMES, shown.lower(), in_url(address)} if local else {"*"}
        app = make_app(model.to(device), checkpoint, names)
        print(f"checkpoint: {path}")
        print(f"page:       http://{shown}:{port}/", flush=True)
        if not local:
            print("open to every computer that reaches this one")
        print("Ctrl-C ends it", flush=True)
        serve(app, listener)
    print("ended")


if __name__ == "__main__":
    cli.run(main)
