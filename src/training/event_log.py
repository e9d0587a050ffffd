"""A run's log for TensorBoard (--log tensorboard): numbers of steps and epochs, pictures, settings.

TensorBoard draws it while the run goes on, beside the logs of other runs. Nothing is read from it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from analysis import explain, figures, model_figures
from common.distributed import World
from common.errors import UserError
from common.files import cannot_write
from common.text import shell_command
from data.dataset import as_pictures
from utils import BatchLoader
from vit_model import ViT

WRITTEN_EVERY = 20  # steps: a GPU is asked for their numbers together, so it need not wait at each
DRAWN = 3  # test images whose attention is shown


def check_package() -> None:
    """Raise UserError if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError(
            "--log tensorboard needs the package tensorboard, which this Python has not: "
            "pip install tensorboard, or leave --log out"
        ) from None


class EventLog:
    """The log of a run, or without a folder none: then every method returns at once.

    Every process of a run has one; the process that leads writes. Steps are counted from the run's
    start, from 1; an epoch's numbers stand at its last step.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: Mapping[str, Any],
        optimizer: Optimizer,
        steps_done: int,
        world: World,
    ) -> None:
        """Begin the log, or continue it after `steps_done`: later steps that it has are dropped.

        Args:
            folder: the run's own.
        """
        self.folder, self.settings, self.world = folder, dict(settings), world
        self.step = steps_done
        groups = (group.get("name", "all parameters") for group in optimizer.param_groups)
        self._rate_names = [f"step/lr/{group}" for group in groups]
        # Of the steps that are not written yet: learning rates, loss, gradient norm.
        self._pending: list[tuple[Sequence[float], Tensor, Tensor]] = []
        self._writer = None
        if folder and world.leads:
            from torch.utils.tensorboard import SummaryWriter  # optional, and slow

            rows = (f"| {name} | `{value}` |" for name, value in settings.items())
            with self._writing():
                self._writer = SummaryWriter(folder, purge_step=steps_done + 1)
                table = "\n".join(["| setting | value |", "|---|---|", *rows])
                self._writer.add_text("settings", table, steps_done + 1)
            command = shell_command(["tensorboard", "--logdir", str(folder.parent)])
            print(f"log:      {folder}; to see it: {command}")

    def add_step(self, lrs: Sequence[float], loss: Tensor, grad_norm: Tensor) -> None:
        """Note a step's numbers; they are written every 20 steps, by `write` and by `end_epoch`.

        Args:
            lrs: by parameter group.
            loss: this process's share of the whole batch's mean.
            grad_norm: before clipping.
        """
        if self.folder:
            self.step += 1
            self._pending.append((lrs, loss, grad_norm))
            if len(self._pending) == WRITTEN_EVERY:
                self.write()

    def write(self) -> None:
        """Write the steps that were noted; a meeting of all processes, and waits for a GPU."""
        if not self._pending:
            return
        rates, losses, norms = zip(*self._pending, strict=True)
        numbers = torch.stack((self.world.sum(torch.stack(losses)), torch.stack(norms)), dim=1)
        first = self.step - len(self._pending) + 1
        self._pending.clear()
        for step, (lrs, (loss, norm)) in enumerate(
            zip(rates, numbers.tolist(), strict=True), first
        ):
            self._add_scalars({"step/loss": loss, "step/grad_norm": norm}, step)
            self._add_scalars(dict(zip(self._rate_names, lrs, strict=True)), step)
        self._flush()

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Write an epoch's numbers, a row of history.json, under the names that they have there."""
        self.write()
        names = ("train_loss", "train_acc", "val_loss", "val_acc", "val_top5")
        self._add_scalars({f"epoch/{name}": row[name] for name in names}, self.step)
        self._flush()

    def finish(
        self, history: dict[str, Any], model: ViT, test_loader: BatchLoader, class_names: list[str]
    ) -> None:
        """Write pictures, the test result and, to compare runs by, the settings.

        They stand a step after the last one: if the run goes on, its next result replaces them.
        """
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        end = self.step + 1
        test = {f"test/{name}": history["test"][name] for name in ("loss", "top1", "top5")}
        attention = _attention_figure(model, test_loader, class_names)
        with self._writing():
            self._writer.add_figure("curves", figures.training_curves(history), end)
            self._writer.add_figure("attention", attention, end)
            self._add_scalars(test, end)
            # Not by add_hparams, which writes a second file: if TensorBoard read that one first,
            # the purge at the start of ours would drop it.
            for summary in hparams(self.settings, test):
                self._writer.file_writer.add_summary(summary)
            self._writer.close()

    def _add_scalars(self, numbers: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            with self._writing():
                for name, value in numbers.items():
                    self._writer.add_scalar(name, value, step)

    def _flush(self) -> None:
        if self._writer is not None:
            with self._writing():
                self._writer.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.folder, error) from None


def _attention_figure(model: ViT, loader: BatchLoader, class_names: list[str]) -> Figure:
    """What the model looks at in the first test images."""
    _, (images, labels) = next(loader.numbered(0, 1))
    images, labels = images[:DRAWN], labels[:DRAWN]
    with torch.no_grad():
        confidence, predicted = model(images).softmax(dim=1).max(dim=1)
    weights = explain.attention_weights(model, images)
    names = figures.labels(class_names)
    shown = enumerate(zip(predicted.tolist(), confidence.tolist(), labels.tolist(), strict=True))
    pixels = as_pictures(loader.split.images[:DRAWN].cpu().numpy())
    return model_figures.attention(
        pixels,
        explain.patch_map(weights, model).cpu().numpy(),
        explain.patch_map(explain.rollout(weights), model).cpu().numpy(),
        [(f"test image {i}", names[guess], p, names[label]) for i, (guess, p, label) in shown],
        pixels.ndim == 3,  # grey: outlined
        "Attention in the first test images",
    )
