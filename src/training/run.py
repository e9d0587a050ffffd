"""What keeps a training run safe, beneath the recipe: its position, stops, bad numbers, saving.

The recipe (train.py) computes; a `Run` counts, saves, prints and ends in good order. It never
touches a gradient. run_files.py says what its files hold.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from analysis import confidence
from common import startup
from common.device import describe_device
from common.distributed import StopBroadcast, World, joined
from common.errors import Stopped, UserError
from common.files import lock_folder
from common.signals import StopSignals
from data.dataset import Dataset
from optimizers.average import WeightAverage
from optimizers.schedule import Schedule
from saving.checkpoint import MAX_WEIGHT, load_checkpoint
from settings import Options, Settings
from training import resume
from training.epoch_sums import EpochSums, NotFiniteError
from training.event_log import EventLog, check_package
from training.resume import SavedRun
from training.run_files import RunFiles, RunPaths
from utils import Batch, BatchLoader, Metrics
from vit_model import ViT, count_parameters

ASKED_EVERY = 20  # steps after which a GPU is asked whether all were finite
# Settings that the printed calls of optimizer and schedule have in them.
SHOWN_AS_CALLS = {"optimizer", "lr", "weight_decay", "scheduler", "scheduler_interval"}
SHOWN_AS_CALLS |= {"warmup_epochs", "swa_lr", "swa_anneal_epochs", "swa_anneal_strategy"}


@contextmanager
def open_run(
    options: Options, given: Mapping[str, Any], world: World, device: torch.device
) -> Iterator[tuple[Options, SavedRun | None]]:
    """Find the run to resume, if any; for the block, lock its folder and connect its processes.
    Raises UserError if there is nothing to resume, or a place can't be written or is another run's.

    Yields:
        The options (a resumed run's own) and the saved run, or None.
    """
    content, source, given = None, options.save_dir, dict(given)
    if options.resume is not None:
        source = Path(options.resume) if options.resume else options.save_dir
        if "save_dir" not in given:
            folder = source if os.path.isdir(source) else source.parent
            options = replace(options, save_dir=folder)
        if world.leads:  # the file needn't be on the others' machines
            content, source = resume.load_last(source)
            paths = resume.find_paths(source, content["run"], given)
            options, given = replace(options, **paths), given | paths
    if world.leads:
        RunPaths(options, device).check_writable()
        if options.log == "tensorboard":
            check_package()
    folder_lock = lock_folder(options.save_dir) if world.leads else nullcontext()
    with folder_lock, joined(world, device):
        saved = None
        if options.resume is not None:
            content, source, given = world.share((content, source, given))
            options, saved = resume.go_on(content, source, options, given)
        if world.leads and not (saved and saved.is_in(options.save_dir)):
            resume.note_unfinished(options.save_dir, saved)
        yield options, saved


@dataclass
class Run:
    """A training run: where it is, how it is saved, how it ends.

    In the order of the calls: `start`; in a `with` block `epochs`, `batches`, `is_finite`,
    `end_step`, `end_epoch`; after it `best_model` and `finish`. Each is a meeting of all processes.
    """

    options: Options
    settings: Settings
    dataset: Dataset
    precision: str  # "bf16" or "fp32", of the matrix products
    device: torch.device
    world: World
    saved: SavedRun | None  # the run to resume

    def __post_init__(self) -> None:
        self._signals = StopSignals(repeats_within=0.3 if self.world.size > 1 else 0.0)
        self._stop = StopBroadcast(self.world)
        # A GPU computes ahead of Python: to ask it after every step would make it wait.
        self._asks_later = self.device.type != "cpu" and self.options.on_nonfinite == "stop"

    def start(
        self,
        model: ViT,
        model_config: dict[str, Any],
        optimizer: Optimizer,
        schedule: Schedule,
        average: WeightAverage,
        loaders: tuple[BatchLoader, BatchLoader, BatchLoader],
    ) -> None:
        """Take what is to be saved; seed this process, or put all where the saved run was.

        Args:
            loaders: of the training, validation and test images.
        """
        self.model, self.optimizer, self.loaders = model, optimizer, loaders
        self.epochs_done, self.sums = 0, EpochSums.zeros(optimizer, self.device)
        about = self.options, self.settings, self.dataset, self.precision, self.device, self.world
        trained = model, model_config, optimizer, schedule, average
        self.files = RunFiles(*about, self.saved, *trained)
        self._print_start(schedule)
        if self.world.rank:  # all drew the same weights, but each draws its own dropout
            torch.manual_seed(self.options.seed + self.world.rank)
        if self.saved:
            parts = model, average, optimizer, schedule, self.sums
            resume.restore(self.saved, *parts, self.device, self.world)
            self.epochs_done = loaders[0].epoch = self.saved.epoch
            loaders[0].skip = self.sums.steps
            self.files.restore()
            done = (
                f"{self.epochs_done} of {self.settings.epochs} epochs and {self.sums.steps} steps"
            )
            print(f"resumed:  {self.saved.path}, after {done}")
        steps_done = self.epochs_done * len(loaders[0]) + self.sums.steps
        about = self.files.log_folder, self.files.about["settings"]
        self.log = EventLog(*about, optimizer, steps_done, world=self.world)
        self._started = time.perf_counter()

    def _print_start(self, schedule: Schedule) -> None:
        options, world = self.options, self.world
        sizes = " / ".join(f"{len(loader.split):,}" for loader in self.loaders)
        channels, side, _ = self.dataset.image_shape
        what = f"{len(self.dataset.class_names)} classes, {side}x{side} pixels"
        what += ", grey" if channels == 1 else ", colour"
        print(f"data:     {self.dataset.name}, {sizes} images to train, validate, test; {what}")
        frozen = sum(p.numel() for p in self.model.parameters() if not p.requires_grad)
        learning = count_parameters(self.model)
        of_them = f", {learning:,} of them learn" if frozen else ""
        print(f"model:    ViT, {frozen + learning:,} parameters{of_them}")
        processes = f", {world.size} processes" if world.size > 1 else ""
        device = f"{describe_device(self.device)}{processes}, {self.precision}"
        print(f"device:   {device}, seed {options.seed}")
        if self.device.type == "cpu" and world.size == 1:
            startup.note_busy_cores(torch.get_num_threads())
        settings = {n: v for n, v in asdict(self.settings).items() if n not in SHOWN_AS_CALLS}
        off = {"layer_decay": 1.0}  # of all others 0, "none" or None
        shown = [f"{n} {v}" for n, v in settings.items() if v not in (off.get(n), None, 0, "none")]
        print(f"recipe:   {options.recipe}: {', '.join(shown)}")
        print(f"steps:    {self.optimizer.text}; {schedule}")
        kept = (self.settings.ema_decay or 0) ** (self.settings.epochs * len(self.loaders[0]))
        if kept > 0.2:
            print(
                f"note: {kept:.0%} of the averaged weights, which are scored, will still come from "
                "the start: lower --ema_decay or --batch_size, or raise --epochs",
                file=sys.stderr,
            )

    # -------------------------------------------------------------------------------------- loop

    def __enter__(self) -> "Run":
        self._compile_seconds = time.perf_counter() - self._started  # a part of the first epoch
        self.sums.seconds += self._compile_seconds
        self._bar = None
        self._signals.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """End in one line, after a step that is not finite and after Ctrl-C."""
        self._signals.__exit__()
        if self._bar is not None:
            self._bar.close()
        if isinstance(error, NotFiniteError):
            self.log.write()
            path = self.files.save_bad_batch(self.epoch, error, self.loaders[0])
            self.world.share(None)  # none ends before it is written
            numbers = f": {error}" if error.numbers else ""
            skip = f", or continue with {self._command_to_continue()} --on_nonfinite skip"
            raise UserError(
                f"step {error.step} of epoch {self.epoch} is not finite{numbers}; its batch is in "
                f"{path}; start again with a lower learning rate or --grad_clip"
                f"{'' if self.files.nothing_saved else skip}"
            ) from None
        if isinstance(error, KeyboardInterrupt):
            go_on = f"to continue from the last save: {self._command_to_continue()}"
            saved = "nothing was saved" if self.files.nothing_saved else go_on
            raise KeyboardInterrupt(f"interrupted; {saved}") from None

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, from 1; the first may have begun."""
        for epoch in range(self.epochs_done + 1, self.settings.epochs + 1):
            self.epoch = epoch
            self._epoch_start = time.perf_counter() - self.sums.seconds
            yield epoch

    def batches(self, loader: BatchLoader) -> Iterator[Batch]:
        """What is left of the epoch, with a progress bar; at its end, sums and time are taken."""
        self._bar = tqdm(
            loader,
            desc=f"epoch {self.epoch}/{self.settings.epochs}",
            unit="batch",
            leave=False,
            initial=self.sums.steps,
            total=len(loader),
            disable=None if self.world.leads else True,
        )
        for images, labels in self._bar:
            # Of this step: when it ends, the schedule has moved.
            self._lrs = [group["lr"] for group in self.optimizer.param_groups]
            yield Batch(images, labels, labels, loader.size_of(self.sums.steps))
        self._row = self.sums.row(self.optimizer, self.world)
        self._train_seconds = self._seconds() - self._compile_seconds

    def _seconds(self) -> float:
        return time.perf_counter() - self._epoch_start

    def is_finite(self, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether the step's loss and gradient are numbers in all processes, so that it is taken.

        Unless such steps are to be skipped, a GPU is asked every 20 steps and before each save;
        until then the answer is yes. Raises NotFiniteError if they are not to be skipped.
        """
        finite = self.world.all(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if self._asks_later:
            self.sums.note(finite)
            return True
        if finite:
            return True
        step, whole_loss = self.sums.steps + 1, self.world.sum(loss.clone()).item()
        numbers = {"loss": whole_loss, "grad_norm": grad_norm.item(), "lr": self._lrs[0]}
        bad = NotFiniteError(step, **numbers)
        if self.options.on_nonfinite == "stop":
            raise bad
        self.sums.skipped.append(step)
        path = self.files.save_bad_batch(self.epoch, bad, self.loaders[0])
        note = f"note: step {step} of epoch {self.epoch} skipped: {bad}"
        tqdm.write(f"{note}; the latest such batch: {path}", file=sys.stderr)
        return False

    def end_step(
        self, batch: Batch, loss: Tensor, hits: Tensor, grad_norm: Tensor, finite: bool
    ) -> None:
        """Count the step; save or stop if it is time. Raises Stopped if a signal has asked for it;
        all is saved.
        """
        sums, last_step = self.sums, len(self.loaders[0])
        sums.add_step(self._lrs)
        if finite:
            sums.add_images(batch, loss, hits, grad_norm)
        self.log.add_step(self._lrs, loss, grad_norm)
        if self._asks_later and (sums.steps % ASKED_EVERY == 0 or sums.steps == last_step):
            sums.check()
        if not self._bar.disable and sums.steps % 20 == 1:
            self._bar.set_postfix(loss=f"{loss.item() * self.world.size:.4f}")
        stop_signal = self._stop.after_step(self._signals.received)
        if sums.steps == last_step:
            return  # it is saved with the epoch
        every = self.options.save_every_steps
        if stop_signal or (every and sums.steps % every == 0):
            sums.seconds = self._seconds()
            self.log.write()  # before the save: a resumed run logs what follows
            self.files.save_last(self.epochs_done, sums)
        if stop_signal:
            raise self._stopped(stop_signal)

    def end_epoch(self, validation: Metrics) -> None:
        """Write the best model, `last.pt`, history and TODO.md so that they agree.

        Raises:
            UserError: training has left all bounds; the files of the last epoch stay.
            Stopped: as `end_step`.
        """
        numbers = (self._row["train_loss"], self._row["grad_norm"], validation.loss)
        largest = max(p.abs().max() for p in self.model.parameters())
        if not all(map(math.isfinite, numbers)) or largest > MAX_WEIGHT:
            raise UserError(
                f"loss, gradient or weights are out of all bounds after epoch {self.epoch}: start "
                "again with a lower learning rate or --grad_clip; what was saved before is kept"
            )
        row = {
            "epoch": self.epoch,
            **self._row,
            "val_loss": validation.loss,
            "val_acc": validation.top1,
            "val_top5": validation.top5,
            "seconds": self._seconds(),
            "images_per_second": len(self.loaders[0].split) / self._train_seconds,
        }
        self.epochs_done, self.sums = self.epoch, EpochSums.zeros(self.optimizer, self.device)
        self._compile_seconds = 0.0
        self.log.end_epoch(row)
        self.files.save_epoch(row, self.sums)
        self._print_epoch(row)
        if stop_signal := self._stop.after_step(self._signals.received):
            raise self._stopped(stop_signal)

    def _print_epoch(self, row: dict[str, Any]) -> None:
        print(
            f"Epoch {row['epoch']:2d}/{self.settings.epochs}  "
            f"Train Loss: {row['train_loss']:.4f}  Acc: {row['train_acc']:.2f} %  |  "
            f"Val Loss: {row['val_loss']:.4f}  Acc: {row['val_acc']:.2f} %  "
            f"Top-5: {row['val_top5']:.2f} %  |  "
            f"lr {next(iter(row['lr'].values())):.1e}  {row['seconds']:.1f} s"
        )
        if row["is_best"]:
            print(f"          best so far, saved to {self.files.paths.best}")

    def _stopped(self, signal_number: int) -> Stopped:
        return Stopped(
            f"stopped by {signal.Signals(signal_number).name} after {self.epochs_done} of "
            f"{self.settings.epochs} epochs and {self.sums.steps} steps, all saved; to continue: "
            f"{self._command_to_continue()}",
            signal_number,
        )

    def _command_to_continue(self) -> str:
        return resume.command_to_continue(self.options, self.files.paths.last, self.world)

    # --------------------------------------------------------------------------------------- end

    def best_model(self) -> ViT:
        """The model of the best epoch, on the run's device; its file gets its calibration."""
        model = load_checkpoint(self.files.paths.best)[0] if self.world.leads else None
        self._best = model = self.world.share(model).to(self.device)
        if self.world.leads:
            train_loader, val_loader, _ = self.loaders
            self.files.save_calibration(confidence.fit(model, train_loader.split, val_loader))
        return model

    def finish(self, test: Metrics) -> None:
        """Write history, timing and curves, and print the result on the test set."""
        self.files.finish(test)
        test_loader, class_names = self.loaders[2], self.dataset.class_names
        self.log.finish(self.files.history, self._best, test_loader, class_names)
