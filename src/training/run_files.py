"""The files of a run: which there are, what each holds, and when it is written."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from analysis import figures
from common.cli import print_test_result
from common.device import describe_device
from common.distributed import World
from common.files import check_writable, write_json, write_text
from common.progress import reset_todo_md, timestamp, update_todo_md
from common.signals import uninterrupted
from data.dataset import Dataset
from optimizers.average import WeightAverage
from optimizers.schedule import Schedule
from saving.checkpoint import FORMAT, read_checkpoint, save_checkpoint, versions
from saving.stored_settings import OF_FOLDER, fingerprint, to_stored
from saving.weights_file import KNOWN
from settings import Options, Settings
from training import resume
from training.best_model import BEST, keep_raw_best, restore_best, set_aside
from training.epoch_sums import EpochSums, NotFiniteError
from training.resume import LAST, PREVIOUS, SavedRun
from utils import BatchLoader, Metrics
from vit_model import count_parameters


class RunPaths:
    """Where a run writes."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.folder, self.todo = options.save_dir, options.todo_path
        self.best, self.last = self.folder / BEST, self.folder / LAST
        self.history = self.folder / "history.json"
        self.timing = self.folder / f"timing_{device.type}.txt"
        self.curves = options.output_dir / "training_curves.png"

    def check_writable(self) -> None:
        """Raise UserError now, rather than after an hour, if one can't be written."""
        for path in (self.best, self.history, self.timing, self.curves, self.todo):
            check_writable(path)


@dataclass
class RunFiles:
    """What the files of a run hold. Only the process that leads writes.

    Attributes:
        best: the best epoch so far, from 1, and its validation accuracy in percent; 0 and -1 if
            there is none.
        history: what history.json holds.
        nothing_saved: whether this run has saved nothing in its folder yet.
        makes_way: whether another run's files in its folder are still to be looked at.
        keeps_last: whether the next save keeps the `last.pt` that is there.
    """

    options: Options
    settings: Settings
    dataset: Dataset
    precision: str
    device: torch.device
    world: World
    saved: SavedRun | None
    model: nn.Module
    model_config: dict[str, Any]
    optimizer: Optimizer
    schedule: Schedule
    average: WeightAverage

    def __post_init__(self) -> None:
        options, saved, optimizer = self.options, self.saved, self.optimizer
        self.paths = RunPaths(options, self.device)
        self.run = to_stored(options, self.settings, self.dataset.source)
        marks = self.dataset.trained_on
        images = b"" if marks is None else marks.numpy().tobytes()
        self.run["fingerprint"] = saved.fingerprint if saved else fingerprint(self.run, images)
        self.best: dict[str, Any] = {"epoch": 0, "acc": -1.0}
        is_here = saved is not None and saved.is_in(options.save_dir)
        self.nothing_saved = not is_here
        self.makes_way = not is_here
        # Not an earlier run's; nor a damaged one, which would take the place of last.prev.pt.
        self.keeps_last = is_here and saved.path.name != PREVIOUS
        settings = {
            "recipe": options.recipe,
            **asdict(self.settings),
            # A rate or decay in the call itself wins over the flags': tell what is really used.
            "lr": optimizer.base_lr,
            "weight_decay": optimizer.param_groups[0].get("weight_decay"),
            "optimizer": optimizer.text,
            "scheduler": self.schedule.text,
            "scheduler_interval": self.schedule.interval,
            "seed": options.seed,
            "train_samples": options.train_samples,
        }
        if self.dataset.source == "folder":
            settings |= {name: self.run[name] for name in OF_FOLDER}
        self.about = {  # what all files tell of the run
            "dataset": self.dataset.name,
            "source": self.dataset.source,
            "fingerprint": self.run["fingerprint"],
            "settings": settings,
            "versions": versions(),
        }
        self.history = {
            **self.about,
            "run": self.run,  # for --config
            "device": describe_device(self.device),
            "processes": self.world.size,
            "precision": self.precision,
            "parameters": count_parameters(self.model),
            "model_config": self.model_config,
            "train_images": len(self.dataset.train[: options.train_samples]),
            "epochs": [],
            "test": None,
        }

    @property
    def log_folder(self) -> Path | None:
        """Where a run and what continues it log; None: they don't."""
        if self.options.log == "none":
            return None
        name = "{dataset}-{recipe}-seed{seed}-{fingerprint}".format(**self.run)
        return self.options.output_dir / "tensorboard" / name

    def restore(self) -> None:
        """Bring the files to where the saved run was: a stop can come between two of them."""
        saved = self.saved
        self.history["epochs"], self.best = saved.content["history"], dict(saved.content["best"])
        self._make_way()
        if self.world.leads and saved.epoch:
            acc, epoch = restore_best(saved.content, saved.path, self.paths.best)
            self.best = {"epoch": epoch, "acc": acc}
            write_json(self.paths.history, self.history)
            rows = self.history["epochs"]
            reset_todo_md(self.settings.epochs, self.paths.todo, self.dataset.name, rows)
        self.best = self.world.share(self.best)

    def _make_way(self) -> None:
        """Before anything is written: move another run's files if it could go on."""
        if self.makes_way and self.world.leads:
            with uninterrupted():
                resume.set_unfinished_aside(self.paths.folder, self.saved)
        self.makes_way = False

    # ------------------------------------------------------------------------------- checkpoints

    def inference_state(self, epochs_done: int) -> dict[str, Any]:
        """What every checkpoint holds: a model, and what it takes to use it and train it on."""
        model, average = self.model, self.average
        known = {name: getattr(self.dataset, name) for name in KNOWN}
        return {
            "format": FORMAT,
            "epoch": epochs_done,
            # To use: the averaged weights if there is an average; then the model's own beside them.
            "model_state_dict": average.module.state_dict(),
            **({"raw_model_state_dict": model.state_dict()} if average.active else {}),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.schedule.state_dict(),
            "best_acc": self.best["acc"],
            "model_config": self.model_config,
            "normalization": {"mean": list(self.dataset.mean), "std": list(self.dataset.std)},
            "preparation": self.dataset.preparation,
            "class_names": list(self.dataset.class_names),
            **{name: marks for name, marks in known.items() if marks is not None},
            **self.about,
        }

    def save_last(self, epochs_done: int, sums: EpochSums) -> None:
        """Write all that it takes to go on to last.pt; a meeting of all processes."""
        sums.check()
        self._make_way()
        sums_of_all = sums.state_dict(self.world)
        generators = self.world.gather(resume.random_state(self.device))
        if self.world.leads:
            content = {
                **self.inference_state(epochs_done),
                "raw_model_state_dict": self.model.state_dict(),  # training goes on from these
                "average_state_dict": self.average.state_dict(),
                "run": self.run,
                "position": {"epoch": epochs_done, "step": sums.steps, "totals": sums_of_all},
                "best": self.best,
                "history": self.history["epochs"],
                "random": generators,
            }
            with uninterrupted():
                how = {"first": self.nothing_saved, "keep": self.keeps_last}
                resume.save_last(self.paths.folder, content, self.options, **how)
        self.nothing_saved, self.keeps_last = False, True
        self.world.share(None)  # none goes on before it is written

    def save_epoch(self, row: dict[str, Any], sums: EpochSums) -> None:
        """Write the best model if it is one, `last.pt`, history.json and TODO.md as one.

        Args:
            row: of history.json; `is_best` and `finished` are added.
            sums: of the next epoch: zeros.
        """
        epoch = row["epoch"]
        if epoch == self.settings.swa_start:
            self.best["acc"] = -1.0  # from here on it is the average that is to be the best
        is_best, is_first_best = row["val_acc"] > self.best["acc"], not self.best["epoch"]
        if is_best:
            self.best = {"epoch": epoch, "acc": row["val_acc"]}
        row |= {"is_best": is_best, "finished": timestamp()}
        self.history["epochs"].append(row)
        self._make_way()
        with uninterrupted():
            if is_best and self.world.leads:  # before last.pt, which counts on it
                if is_first_best:
                    set_aside(self.paths.folder, self.about)
                if epoch == self.settings.swa_start:
                    keep_raw_best(self.paths.best, epoch)
                save_checkpoint(self.paths.best, self.inference_state(epoch))
            self.save_last(epoch, sums)
            if self.world.leads:
                write_json(self.paths.history, self.history)
                if epoch == 1:  # not before: until then it is an earlier run's
                    reset_todo_md(self.settings.epochs, self.paths.todo, self.dataset.name)
                scores = row["train_loss"], row["val_acc"], is_best
                update_todo_md(epoch, *scores, self.paths.todo)

    def save_calibration(self, calibration: dict[str, Any]) -> None:
        """Add the calibration to the best model's checkpoint."""
        with uninterrupted():
            content = {**read_checkpoint(self.paths.best), "calibration": calibration}
            save_checkpoint(self.paths.best, content)

    def save_bad_batch(self, epoch: int, bad: NotFiniteError, loader: BatchLoader) -> Path:
        """Write the batch of a step that was not finite, to be looked at."""
        path = self.paths.folder / "nonfinite.pt"
        if self.world.leads:
            batch: tuple[Tensor, Tensor] = loader.batch_of_all(epoch - 1, bad.step - 1)
            content = {"epoch": epoch, "step": bad.step, **bad.numbers}
            content |= {"images": batch[0], "labels": batch[1]}
            save_checkpoint(path, {**content, "model_state_dict": self.model.state_dict()})
        return path

    # ------------------------------------------------------------------------------------ results

    def finish(self, test: Metrics) -> None:
        """Write history, timing and curves, and print the result on the test set."""
        best_acc, best_epoch, epochs = self.best["acc"], self.best["epoch"], self.settings.epochs
        best = {"best_val_acc": best_acc, "best_epoch": best_epoch}
        self.history["test"] = {**test._asdict(), **best}
        seconds = sum(row["seconds"] for row in self.history["epochs"])
        timing = {
            "device": describe_device(self.device),
            "epochs": epochs,
            "batch_size": self.settings.batch_size,
            "total_train_time": f"{seconds:.2f}",
            "avg_time_per_epoch": f"{seconds / epochs:.2f}",
            "best_val_acc": f"{best_acc:.2f}",
            "test_acc": f"{test.top1:.2f}",
            "test_top5": f"{test.top5:.2f}",
            "dataset": self.dataset.name,
            "fingerprint": self.run["fingerprint"],
        }
        paths = self.paths
        if self.world.leads:
            with uninterrupted():
                write_json(paths.history, self.history)
                lines = (f"{key}: {value}\n" for key, value in timing.items())
                write_text(paths.timing, "".join(lines))
                figures.save(figures.training_curves(self.history), paths.curves)
        print_test_result(self.dataset.name, *test)
        print(f"Best Val Acc: {best_acc:.2f} % @ Epoch {best_epoch}")
        each, rate = seconds / epochs, epochs * self.history["train_images"] / seconds
        print(f"Time: {seconds:.1f} s in all, {each:.1f} s an epoch, {rate:.0f} images/s")
        written = paths.best, paths.history, paths.timing, paths.curves, paths.todo
        print(f"Written: {', '.join(map(str, written))}")
