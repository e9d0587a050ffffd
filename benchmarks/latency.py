"""Latency and throughput of a trained network: eager PyTorch in fp32 and bf16, torch.compile, ONNX
Runtime in fp32 and int8, and, where it is installed, OpenVINO in fp32, bf16 and int8.

The runtimes take turns of several calls, so that a machine that slows down slows all; a turn's
first call, which finds the others' weights in the caches, is not timed. Inputs are random: the time
does not depend on them.
"""

import report  # finds src

import io
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common import cli
from common.device import choose_device
from deploy.export import onnx_session, to_bytes, to_int8, to_onnx
from saving.checkpoint import load_checkpoint
from settings import add_flags
from vit_model import ViT


def export(model: ViT, images: Tensor) -> dict[str, bytes]:
    """The network as ONNX, by what follows the name of what runs it."""
    plain = to_onnx(model, images[:2])
    return {"": to_bytes(plain), ", int8": to_bytes(to_int8(plain, images))}


def in_openvino(exported: dict[str, bytes]) -> dict[str, Callable[[Tensor], Tensor]]:
    """The exported network in OpenVINO, by name, if it is installed."""
    try:
        import openvino
    except ImportError:
        return {}
    core, runtimes = openvino.Core(), {}
    how = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    for kind, precision in (("", "f32"), (", bf16", "bf16"), (", int8", "f32")):
        network = core.read_model(io.BytesIO(exported.get(kind, exported[""])))
        how["INFERENCE_PRECISION_HINT"] = precision
        compiled = core.compile_model(network, "CPU", how)
        runtimes[f"OpenVINO{kind}"] = lambda x, run=compiled: torch.from_numpy(run(x.numpy())[0])
    return runtimes


def build_runtimes(
    model: ViT, exported: dict[str, bytes], device: torch.device
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The network in each runtime, by name, with as many threads as PyTorch has now."""

    def in_bf16(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(images)

    torch.compiler.reset()  # it stops to compile a network after some shapes
    compiled = torch.compile(model, dynamic=False)
    runtimes = {"eager": model, "eager, bf16": in_bf16, "compiled": compiled}
    for kind, content in exported.items():
        runtimes[f"ONNX Runtime{kind}"] = onnx_session(content)
    return runtimes | (in_openvino(exported) if exported else {})


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="None: the default network, untrained")
    parser.add_argument("--batch_sizes", default=[1, 256], type=cli.integer(1), nargs="+")
    parser.add_argument(
        "--threads", default=[1], type=cli.integer(1, 1024), nargs="+", help="of the CPU"
    )
    parser.add_argument("--turns", default=10, type=cli.integer(3), help="timed turns of each")
    parser.add_argument("--calls", default=10, type=cli.integer(1), help="timed calls in a turn")
    add_flags(parser, ("device",))
    report.add_record(parser)
    args = parser.parse_args()
    device = choose_device(args.device)
    model = load_checkpoint(args.checkpoint)[0] if args.checkpoint else ViT().eval()
    # The GPU's build of ONNX Runtime is none of our packages.
    side, channels = model.patch_embed.img_size, model.patch_embed.proj.in_channels
    exported = export(model, torch.randn(100, channels, side, side)) if device.type == "cpu" else {}
    model = model.to(device)

    def seconds(run: Callable, images: Tensor) -> float:
        """Of a call, in the mean over a turn."""
        run(images)
        calls = [report.seconds(lambda: run(images), device) for _ in range(args.calls)]
        return statistics.mean(calls)

    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        runtimes = build_runtimes(model, exported, device)
        for batch_size in args.batch_sizes:
            images = torch.randn(batch_size, channels, side, side, device=device)
            with torch.inference_mode():
                for run in runtimes.values():
                    seconds(run, images)  # warm-up
                turns = [
                    [seconds(run, images) for run in runtimes.values()] for _ in range(args.turns)
                ]
            eager = [turn[0] for turn in turns]
            for name, times in zip(runtimes, zip(*turns, strict=True), strict=True):
                median = statistics.median(times)
                gain = statistics.median(e / t for e, t in zip(eager, times, strict=True))
                rows.append(
                    [
                        name,
                        str(batch_size),
                        str(threads),
                        f"{1000 * median:.2f} ms",
                        f"{batch_size / median:.0f}",
                        f"{gain:.2f}",
                    ]
                )
    report.publish(
        f"Inference, median of {args.turns} turns of {args.calls} calls",
        ["runtime", "batch", "threads", "latency", "images/s", "times eager's speed"],
        rows,
        device=device,
        record=args.record,
    )


if __name__ == "__main__":
    cli.run(main)
