"""A trained model as a file that runs without this project: ONNX, or a program of torch.export."""

import io
import json
import statistics
import tempfile
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.onnx_model import OnnxModel
from torch import Tensor, nn
from tqdm import tqdm

from analysis.words import PREPARED
from common.errors import UserError
from data.dataset import Split, per_channel
from saving.checkpoint import image_shape
from utils import images_at_once
from vit_model import ViT

# Largest difference of an output from PyTorch's. int8 has no such limit: its classes are compared.
TOLERANCE = {"fp32": 1e-4, "fp16": 0.05}
MAX_LOSS = 1.0  # percentage points of validation accuracy, beyond what chance explains
INT8_IMAGES = 1000  # training images that set the ranges of int8's activations
LATENCY_CALLS = 300

Network = Callable[[Tensor], Tensor]  # in whatever runtime


# -------------------------------------------------------------------------------------- the files


class RawInput(nn.Module):
    """A network with the steps before and after it: pixels in, class probabilities out.

    Shape: uint8 (B, C, S, S) -> (B, num_classes).
    """

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        temperature: float,
    ) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", per_channel(mean), persistent=False)
        self.register_buffer("std", per_channel(std), persistent=False)
        self.temperature = temperature

    def normalize(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        return (self.network(self.normalize(pixels)) / self.temperature).softmax(dim=1)


def describe(checkpoint: dict[str, Any], precision: str, raw_input: bool) -> dict[str, str]:
    """What a user of the file has to know, written into it."""
    channels, side, _ = image_shape(checkpoint)
    shape = f"(batch, {channels}, {side}, {side})"
    classes = f"float32 (batch, {len(checkpoint['class_names'])}), one for each of class_names"
    if raw_input:
        images, outputs = "pixels from 0 to 255, not normalised", "probabilities"
    else:
        images = "(pixel / 255 - mean) / std, by channel"
        outputs = "logits (softmax of logits / temperature gives probabilities)"
    colours = {1: "grey", 3: "red, green, blue"}.get(channels, f"{channels} channels")
    return {
        "dataset": checkpoint["dataset"],
        "class_names": json.dumps(checkpoint["class_names"]),
        **{
            name: ", ".join(map(str, values))  # for each channel
            for name, values in checkpoint["normalization"].items()
        },
        "temperature": str(checkpoint["calibration"]["temperature"]),
        "image_size": str(side),
        "channels": colours,
        "preparation": PREPARED[checkpoint["preparation"]],
        "input": f"{'uint8' if raw_input else 'float32'} {shape}: {images}",
        "output": f"{outputs}, {classes}",
        "precision": precision,
    }


@torch.no_grad()
def to_onnx(network: nn.Module, sample: Tensor) -> onnx.ModelProto:
    """The network, on the CPU, as an ONNX model: `input` to `output`, with a free batch axis.

    Args:
        sample: a batch of at least two, as the network takes it.
    """
    model = torch.onnx.export(
        network,
        (sample,),
        input_names=["input"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=20,  # the first with Gelu; 17 brought LayerNormalization
        dynamo=True,
        verbose=False,
    ).model_proto
    for part in (model.graph, *model.graph.node):
        del part.metadata_props[:]  # lines of source code, and the path of their file
    return model


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in fp16, by ONNX Runtime's converter; input and output keep their types."""
    half = OnnxModel(model)
    half.convert_float_to_float16(use_symbolic_shape_infer=False, keep_io_types=True)
    half.topological_sort()
    return half.model


def to_int8(model: onnx.ModelProto, batches: Iterator[Tensor]) -> onnx.ModelProto:
    """The model with 8-bit products of activations and weights, by ONNX Runtime's static quantizer.

    Each column of a weight has a scale of its own; the two products within attention stay in fp32.

    Args:
        batches: of images (n, C, S, S), as the network takes them, for the activations' ranges.
    """

    inputs = ({"input": batch.numpy()} for batch in batches)

    class Batches(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(inputs, None)

    weights = {tensor.name for tensor in model.graph.initializer}
    attention = [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] not in weights
    ]
    with tempfile.TemporaryDirectory() as folder:
        exported, prepared, quantized = (str(Path(folder, f"{i}.onnx")) for i in range(3))
        onnx.save(model, exported)
        quant_pre_process(exported, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantized,
            Batches(),
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=attention,
            per_channel=True,
            reduce_range=True,  # 7 bits: x86 CPUs without VNNI add two products in 16 bits
        )
        return onnx.load(quantized)


def to_bytes(model: onnx.ModelProto, metadata: dict[str, str] | None = None) -> bytes:
    """The content of a checked `.onnx` file with this `metadata`."""
    onnx.helper.set_model_props(model, metadata or {})
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def onnx_session(content: bytes) -> Network:
    """An ONNX model in ONNX Runtime, on the CPU, with as many threads as PyTorch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["output"], {"input": x.numpy()})[0])


def to_program(network: nn.Module, sample: Tensor, metadata: dict[str, str]) -> bytes:
    """The network as a `.pt2` file of torch.export, with `metadata.json` in it."""
    dynamic_shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (sample,), dynamic_shapes=dynamic_shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # as in to_onnx
    content = io.BytesIO()
    extra_files = {"metadata.json": json.dumps(metadata)}
    torch.export.save(program, content, extra_files=extra_files)
    return content.getvalue()


# ------------------------------------------------------------------------ compared with PyTorch


@dataclass(frozen=True)
class Exported:
    """What a file will hold, and the network that it was made from."""

    content: bytes
    file: Network  # in the runtime that it is for
    network: nn.Module  # in PyTorch
    prepare: Callable[[Tensor], Tensor]  # from uint8 pixels to what both take
    image_shape: tuple[int, int, int]

    @property
    def batch_sizes(self) -> tuple[int, int, int]:
        """Of the batches to compare the two on; large images need much memory."""
        return 1, 7, min(128, 7 + images_at_once(self.image_shape[-1]))

    def random_images(self, batch: int) -> Tensor:
        return self.prepare(torch.randint(256, (batch, *self.image_shape), dtype=torch.uint8))

    @torch.inference_mode()
    def largest_difference(self) -> float:
        """Of an output from PyTorch's, over batches of random images."""
        batches = [self.random_images(batch) for batch in self.batch_sizes]
        differences = [(self.file(x) - self.network(x)).abs().max() for x in batches]
        return float(torch.stack(differences).max())  # NaN if there is one

    @torch.inference_mode()
    def classes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """PyTorch's and the file's class (n,) of each image, uint8 (n, C, S, S)."""
        parts = images.split(images_at_once(self.image_shape[-1]))
        batches = tqdm(parts, "validating", disable=None, leave=False)
        pairs = [(self.network(x), self.file(x)) for x in map(self.prepare, batches)]
        expected, found = (torch.cat(outputs).argmax(1) for outputs in zip(*pairs, strict=True))
        return expected, found

    @torch.inference_mode()
    def latencies(self) -> tuple[float, float]:
        """PyTorch's and the file's seconds for one image, each the median of `LATENCY_CALLS`."""
        image = self.random_images(1)

        def median(call: Network) -> float:
            return statistics.median(
                timeit.repeat(lambda: call(image), number=1, repeat=20 + LATENCY_CALLS)[20:]
            )

        return median(self.network), median(self.file)


def export(
    model: ViT,
    checkpoint: dict[str, Any],
    *,
    mode: str = "onnx",
    precision: str = "fp32",
    raw_input: bool = False,
    int8_images: Tensor | None = None,
) -> Exported:
    """Export a model.

    Args:
        model: on the CPU, in evaluation mode.
        mode: "onnx" or "torch_export".
        precision: "fp32", or of ONNX "fp16" and "int8".
        raw_input: put normalisation, temperature and softmax into the file.
        int8_images: for int8, training images without augmentation, uint8 (n, C, S, S).
    """
    temperature = checkpoint["calibration"]["temperature"]
    wrapped = RawInput(model, **checkpoint["normalization"], temperature=temperature).eval()
    network, prepare = (wrapped, lambda pixels: pixels) if raw_input else (model, wrapped.normalize)
    shape = image_shape(checkpoint)
    sample = prepare(torch.zeros(2, *shape, dtype=torch.uint8))
    metadata = describe(checkpoint, precision, raw_input)
    if mode == "torch_export":
        content = to_program(network, sample, metadata)
        file = torch.export.load(io.BytesIO(content)).module()
    else:
        exported = to_onnx(network, sample)
        if precision == "fp16":
            exported = to_half(exported)
        if precision == "int8":
            parts = int8_images.split(min(100, images_at_once(shape[-1])))
            exported = to_int8(exported, map(prepare, parts))
        content = to_bytes(exported, metadata)
        file = onnx_session(content)
    return Exported(content, file, network, prepare, shape)


def compare(exported: Exported, precision: str, name: str, val: Split | None) -> str:
    """Compare the file `name` with PyTorch: size, latency, and accuracy on validation images.
    Raises UserError if an output differs from PyTorch's by more than `TOLERANCE`, or the validation
    accuracy is lower by more than `MAX_LOSS`.

    Args:
        val: not the test images, since they decide whether the file is written.
    """
    without = "" if precision == "fp32" else "; export it without --half and --quantize"
    advice = f"not written{without}"
    weights = exported.network.state_dict().values()
    sizes = sum(tensor.numel() * tensor.element_size() for tensor in weights), len(exported.content)
    rows = [["", "PyTorch", name], ["size", *(f"{size / 1e6:.2f} MB" for size in sizes)]]
    notes = []
    if precision in TOLERANCE:
        difference = exported.largest_difference()
        few, some, many = exported.batch_sizes
        batches = f"batches of {few}, {some} and {many}"
        notes += [f"largest difference from PyTorch on {batches}: {difference:.1e}"]
        if not difference <= TOLERANCE[precision]:
            raise UserError(
                f"{name} in {precision} differs from PyTorch by {difference:.1e}, expected at most "
                f"{TOLERANCE[precision]:.0e}: {advice}"
            )
    if val is not None:
        classes = exported.classes(val.images)
        before, after = (100 * float((c == val.labels).double().mean()) for c in classes)
        different = int((classes[0] != classes[1]).sum())
        same = f"{len(val) - different:,} of {len(val):,} validation images"
        notes += [f"same class as PyTorch: {same}"]
        rows += [["validation accuracy", f"{before:.2f} %", f"{after:.2f} %"]]
        # With few images the loss may be chance (McNemar, 1947): two standard deviations more.
        chance = 100 * 2 * different**0.5 / len(val)
        if before - after > MAX_LOSS + chance:
            raise UserError(
                f"{name} in {precision} has a validation accuracy of {after:.2f} %, expected at "
                f"most {MAX_LOSS + chance:.1f} points below PyTorch's {before:.2f} %: {advice}"
            )
    rows += [["latency, one image", *(f"{1000 * s:.2f} ms" for s in exported.latencies())]]
    notes += [f"latency: CPU, threads: {torch.get_num_threads()}, median of {LATENCY_CALLS} calls"]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = ["".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines + notes)
