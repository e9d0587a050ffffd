"""A trained model as a file that runs elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cli import UserError
from files import replacing
from vit_model import ViT

ONNX_TOLERANCE = 1e-4  # between PyTorch's and ONNX Runtime's logits


@torch.no_grad()
def export_onnx(model: ViT, config: dict[str, Any], metadata: dict[str, str], path: Path) -> float:
    """Export to one ONNX file with a free batch axis, check it, and run it against PyTorch.

    Args:
        model: on the CPU.
        config: the model's arguments, for the size of its images.
        metadata: what the file says of itself.

    Returns:
        The largest difference of a logit over batches of 1, 7 and 128 random images.

    Raises:
        UserError: it is over `ONNX_TOLERANCE`, or the file can't be written.
    """
    import onnx
    import onnxruntime

    def random_images(batch: int) -> Tensor:
        side = config["img_size"]
        return torch.randn(batch, config["in_chans"], side, side)

    with replacing(path) as temporary:
        torch.onnx.export(
            model,
            (random_images(2),),
            temporary,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=20,  # the first with Gelu; 17 brought LayerNormalization
            external_data=False,
            dynamo=True,
            verbose=False,
        )
        exported = onnx.load(temporary)
        onnx.helper.set_model_props(exported, metadata)
        onnx.save(exported, temporary)
        onnx.checker.check_model(temporary, full_check=True)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        largest = 0.0
        for batch in (1, 7, 128):
            images = random_images(batch)
            (output,) = session.run(["output"], {"input": images.numpy()})
            largest = max(largest, float(np.abs(output - model(images).numpy()).max()))
        if not largest <= ONNX_TOLERANCE:
            raise UserError(
                f"{path} not written: ONNX Runtime's logits differ from PyTorch's by "
                f"{largest:.1e}, expected at most {ONNX_TOLERANCE:.0e}"
            )
    return largest
