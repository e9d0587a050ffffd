"""The flags of inference.py and demo.py. Imports nothing heavy: they are read before PyTorch is."""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from common import cli
from common.errors import UserError
from deploy.answers import FORMATS
from settings import add_flags


class Mode(NamedTuple):
    """What `--mode` names: its line in the help, and the file that it writes; SET stands for the
    name of the model's data set."""

    help: str
    output: str


MODES = {
    "visualize": Mode("16 random test images", "./outputs/predictions.png"),
    "attention": Mode("what it looks at", "./outputs/attention.png"),
    "embeddings": Mode("positions, patches, classes", "./outputs/embeddings.png"),
    "confusion": Mode("right and wrong by class", "./outputs/confusion.png"),
    "calibration": Mode("confidence, accuracy", "./outputs/calibration.png"),
    "report": Mode("a page with all pictures", "./outputs/report.html"),
    "evaluate": Mode("score on the test images", "./outputs/evaluation.json"),
    "onnx": Mode("export to ONNX", "./outputs/vit_SET.onnx"),
    "torch_export": Mode("export with torch.export", "./outputs/vit_SET.pt2"),
    "safetensors": Mode("weights alone, and how to use them", "./outputs/vit_SET.safetensors"),
    "timm": Mode("weights for timm", "./outputs/vit_SET_timm.pth"),
    "webpage": Mode("a page to draw digits on, in one file", "./outputs/vit_SET.html"),
    "predict": Mode("your own images", "./outputs/predictions.json"),
}
EXPORTS, WEIGHTS = ("onnx", "torch_export"), ("safetensors", "timm")
# How a file's name ends, where that tells what it is.
ENDINGS = {"report": (".html",), "webpage": (".html",), "safetensors": (".safetensors",)}
ENDINGS |= {"timm": (".pth", ".pt", ".safetensors"), "onnx": (".onnx",), "torch_export": (".pt2",)}
ENDINGS |= {"evaluate": (".json",), "predict": (".json",)}


def _all_but(*modes: str) -> tuple[str, ...]:
    return tuple(mode for mode in MODES if mode not in modes)


# A flag that would change nothing in a mode is refused there.
FLAGS_OF_MODES: dict[str, tuple[tuple[str, ...], str]] = {
    "image": (("predict",), "names pictures to answer"),
    "data_dir": (_all_but("predict", *WEIGHTS), "names a data set"),
    "format": (("predict",), "(text, csv, json) is the form of the answers"),
    "single": (("predict",), "takes a picture for one digit"),
    "device": (_all_but(*EXPORTS, *WEIGHTS), "is where the network computes"),
    "index": (("attention", "report"), "chooses test images"),
    "seed": (("visualize", "attention", "embeddings", "report"), "draws test images at random"),
    "half": (("onnx",), "is the precision of a file"),
    "quantize": (("onnx",), "is the precision of a file"),
    "raw_input": (EXPORTS, "is what a file takes and gives"),
}
MAX_INDICES = 12  # a picture of more images is too tall to read


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The flag `--checkpoint`; `saving.checkpoint.find_checkpoint` reads it."""
    own = "./checkpoints/best_model.pt if it is there, else the pretrained one of this repository"
    parser.add_argument("--checkpoint", help=f"trained model, or its folder; None: {own}")


def parse_args() -> argparse.Namespace:
    """The flags of inference.py; `output` is a Path, or None."""
    parser = cli.Parser(description="Use a trained model: pictures, scores, exports, answers.")
    add = parser.add_argument
    modes = "; ".join(f"{name}: {mode.help}" for name, mode in MODES.items())
    add("--mode", default="visualize", choices=list(MODES), help=modes)
    add_checkpoint(parser)
    images = "for predict: image files, folders (the images right in them), - for stdin"
    add("--image", nargs="+", action="extend", metavar="FILE", help=images)
    single = "for predict: each image is known to hold one digit; its strokes may lie apart"
    add("--single", action="store_true", help=single)
    form = "of predict on stdout; with json and csv nothing else is printed there"
    add("--format", default="text", choices=list(FORMATS), help=form)
    files = ", ".join(f"{name}: {mode.output}" for name, mode in MODES.items())
    files = f"file that is written (default: {files}; SET: the name of the data set)"
    add("--output", default=argparse.SUPPRESS, help=files)
    add("--seed", type=cli.integer(0), help="for random test images and t-SNE: the same again")
    index = f"for attention and report: up to {MAX_INDICES} test images, counted from 0, not random"
    add("--index", nargs="+", type=cli.integer(0), metavar="N", help=index)
    data_dir = (
        "a folder with a folder of pictures for each class, in its folder test, else train, else "
        "right in it, to score the model on; or where its own data set is; None: where train.py "
        "puts that"
    )
    add("--data_dir", help=data_dir)
    add_flags(parser, ("device",))
    add = parser.add_argument_group("for onnx; --raw_input for torch_export, too").add_argument
    int8 = "int8: weights and the activations before them in 8 bits, ranges from training images"
    add("--quantize", default="none", choices=["none", "int8"], help=int8)
    add("--half", action="store_true", help="weights and activations in fp16")
    raw = "uint8 pixels in, probabilities out: normalisation and softmax are in the file"
    add("--raw_input", action="store_true", help=raw)
    args = parser.parse_args()
    _check_combination(args, parser)
    args.output = Path(parser.given["output"]) if "output" in parser.given else None
    endings = ENDINGS.get(args.mode)
    if args.output and endings and args.output.suffix.lower() not in endings:
        raise UserError(
            f"--output {args.output}: the name of a file of --mode {args.mode} ends in "
            f"{' or '.join(endings)}"
        )
    return args


def default_output(mode: str, dataset: str) -> Path:
    """The file that a mode writes unless `--output` names another.

    Args:
        dataset: the name for --dataset of the model's; a file may say anything.
    """
    return Path(MODES[mode].output.replace("SET", re.sub(r"\W+", "_", dataset)))


def _check_combination(args: argparse.Namespace, parser: cli.Parser) -> None:
    """Raise UserError where a flag does not go with the mode or with another flag."""
    for flag, (modes, effect) in FLAGS_OF_MODES.items():
        if args.mode not in modes and flag in parser.given:
            raise UserError(
                f"--mode {args.mode} given, but --{flag} {effect}, which is for --mode "
                f"{' or '.join(modes)}: leave it out"
            )
    if args.half and args.quantize != "none":
        raise UserError(f"--half and --quantize {args.quantize} contradict each other: give one")
    if args.mode == "predict" and args.image is None:
        raise UserError("--mode predict: name the pictures to read with --image FILE")
    if args.mode == "attention" and args.index and "seed" in parser.given:
        raise UserError("--seed draws test images and --index names them: give one")
    if args.index and len(args.index) > MAX_INDICES:
        raise UserError(f"--index names {len(args.index)} images, expected at most {MAX_INDICES}")


def parse_demo_args() -> argparse.Namespace:
    """The flags of demo.py."""
    parser = cli.Parser(description="A web page to draw digits on, or to drop pictures on.")
    add_checkpoint(parser)
    host = "address to serve on: 127.0.0.1 for this computer alone, 0.0.0.0 for its networks"
    parser.add_argument("--host", default="127.0.0.1", help=host)
    port = "port to serve on; 0: any free one"
    parser.add_argument("--port", type=cli.integer(0, 65535), default=7860, help=port)
    add_flags(parser, ("device",))
    return parser.parse_args()
