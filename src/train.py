"""Train the Vision Transformer: arguments, data, model, optimizer, loop, checkpoint, report."""

import common.startup  # noqa: F401 before PyTorch

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import optim
from analysis import confidence, figures
from common import cli, distributed, startup
from common.device import choose_device, choose_precision, describe_device
from common.distributed import ALONE, World
from common.errors import Stopped, UserError
from common.files import check_writable, held, write_json, write_text
from common.progress import reset_todo_md, timestamp, update_todo_md
from common.signals import StopSignals, uninterrupted
from data.augment import Augment
from data.dataset import DataMissingError, Dataset
from data.load import load_dataset
from recipes import DATASET_SETTINGS, DEFAULTS, RECIPES, fingerprint
from saving.checkpoint import (
    MAX_WEIGHT,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    versions,
)
from training import resume
from training.speed import compile_network, keep_memory
from utils import BatchLoader, evaluate, make_loaders
from vit_model import ViT, count_parameters

MODEL_SETTINGS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "dropout")
MODEL_SETTINGS += ("pool", "pos_embed")
# Settings that the printed calls of optimizer and schedule have in them.
SHOWN_AS_CALLS = {"optimizer", "lr", "weight_decay", "scheduler", "scheduler_interval"}
SHOWN_AS_CALLS |= {"warmup_epochs", "swa_lr", "swa_anneal_epochs", "swa_anneal_strategy"}


def parse_args(
    flags: Sequence[str] | None = None,
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags, of the command line by default, and those that it names: they win over recipe and
    data set."""
    parser = cli.Parser(description=__doc__)

    data = parser.add_argument_group("data")
    cli.add_data_dir(data)
    data.add_argument(
        "--dataset",
        default="auto",
        choices=["auto", *DATASET_SETTINGS],
        help="auto: mnist, or, without --data_dir, digits where MNIST can neither be found nor "
        "downloaded",
    )
    data.add_argument(
        "--train_samples",
        type=cli.integer(1),
        metavar="N",
        help="train on the first N images only, for a quick look; None: on all",
    )
    data.add_argument(
        "--num_workers",
        default=0,
        type=cli.integer(0, 256),
        help="threads that prepare batches ahead; 0: none",
    )

    def add_setting(group: argparse._ArgumentGroup, name: str, type: Any, help: str) -> None:
        group.add_argument(f"--{name}", type=type, default=DEFAULTS[name], help=help)

    def add_choice(group: argparse._ArgumentGroup, name: str, choices: Any, help: str) -> None:
        group.add_argument(f"--{name}", choices=choices, default=DEFAULTS[name], help=help)

    recipe = parser.add_argument_group("recipe (the defaults of all flags below are the article's)")
    recipe.add_argument(
        "--recipe",
        default="article",
        choices=RECIPES,
        help="flags by name, from recipes.py: article, the published ones; fast, the least time to "
        "99 %%; best, the highest accuracy in 20 minutes; flags given beside it win",
    )
    add_setting(recipe, "epochs", cli.integer(1, 10**6), "passes over the training images")
    add_setting(recipe, "batch_size", cli.integer(1), "images in a step")
    add_setting(recipe, "label_smoothing", cli.number(0, 1), "share of a target spread evenly")
    recipe.add_argument(
        "--seed", default=42, type=cli.integer(0), help="of weights, order, augmentation, dropout"
    )
    optim.add_arguments(parser)

    model = parser.add_argument_group("model")
    add_setting(model, "patch_size", cli.integer(1), "side of a patch in pixels; divides 28")
    add_setting(model, "embed_dim", cli.integer(1, 10**5), "width of a token")
    add_setting(model, "depth", cli.integer(1, 10**4), "transformer blocks")
    add_setting(model, "num_heads", cli.integer(1), "attention heads; divide embed_dim")
    add_setting(model, "mlp_ratio", cli.number(0, 1000, above=True), "MLP width over token width")
    add_setting(model, "dropout", cli.number(0, 1), "share of values dropped in training")
    add_choice(model, "pool", ("cls", "mean"), "what the head reads: CLS, or the tokens' mean")
    add_choice(model, "pos_embed", ("learned", "sincos2d"), "position embeddings")

    augment = parser.add_argument_group("augmentation (strengths; 0: off)")
    add_setting(augment, "rotate", cli.number(0, 181), "degrees, at most, to either side")
    add_setting(augment, "translate", cli.number(0, 1), "shift, at most, in image sides")
    add_setting(augment, "scale", cli.number(0, 1), "the size varies by this share, up and down")
    add_setting(augment, "shear", cli.number(0, 90), "slant in degrees, at most, to either side")
    add_setting(augment, "elastic", cli.number(0, 28), "bending: std of the shifts in pixels")
    add_setting(augment, "erase", cli.number(0, 1), "share of images that lose a rectangle")

    machine = parser.add_argument_group("machine")
    cli.add_device(machine)
    machine.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="of training's matrix products; auto: bf16 where the hardware has it",
    )
    machine.add_argument(
        "--grad_accum_steps",
        default=1,
        type=cli.integer(1, 10**6),
        metavar="N",
        help="a batch passes the network in N parts, one after the other, in less memory; the step "
        "is the same",
    )
    machine.add_argument(
        "--compile",
        default="auto",
        choices=["auto", "on", "off"],
        help="the network by torch.compile; auto: on CUDA",
    )

    safety = parser.add_argument_group("going on")
    safety.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on with the run that left this last.pt, by default that in --save_dir, as if it "
        "had never stopped; its settings come with it",
    )
    safety.add_argument(
        "--save_every_steps",
        type=cli.integer(1),
        metavar="N",
        help="write last.pt every N steps of an epoch too; None: at its end",
    )
    safety.add_argument(
        "--on_nonfinite",
        default="stop",
        choices=["stop", "skip"],
        help="where loss or gradient is infinite or not a number: stop, or skip the step",
    )

    written = parser.add_argument_group("what is written")
    written.add_argument("--save_dir", default="./checkpoints", type=Path, help="model, history")
    written.add_argument("--output_dir", default="./outputs", type=Path, help="pictures")
    written.add_argument("--todo_path", default="./TODO.md", type=Path, help="progress table")
    return parser.parse_args(flags), parser.given(flags)


def choose_dataset(name: str, data_dir: str) -> Dataset:
    """The data set asked for; for "auto" MNIST or, where it is not to be had, the digits."""
    if name != "auto":
        return load_dataset(name, data_dir)
    try:
        return load_dataset("mnist", data_dir)
    except DataMissingError as error:
        rule = "!" * 80
        warning = "WARNING: training on scikit-learn's 8x8 digits, NOT on MNIST"
        print(f"{rule}\n{warning}\n{error}\n{rule}", file=sys.stderr)
        return load_dataset("digits")


def load_in_turn(name: str, data_dir: str, world: World) -> Dataset:
    """`choose_dataset` for several processes: all the same, and one on a machine downloads it."""
    dataset = choose_dataset(name, data_dir) if world.leads else None
    name = world.share(dataset and dataset.name)
    if world.rank and world.local_rank == 0:
        dataset = load_dataset(name, data_dir)
    world.gather(None)  # by now it is on every machine
    return dataset or load_dataset(name, data_dir)


def settings_for(recipe: str, dataset: str, given: dict[str, Any]) -> dict[str, Any]:
    """The run's settings: the defaults, what replaces them in the recipe, what the data set asks
    for, what was given by hand.

    Raises:
        UserError: the settings don't fit together.
    """
    given = {name: value for name, value in given.items() if name in DEFAULTS}
    settings = {**DEFAULTS, **RECIPES[recipe], **DATASET_SETTINGS[dataset], **given}
    if 28 % settings["patch_size"] != 0:
        raise UserError(
            f"--patch_size {settings['patch_size']} does not divide the image's side of 28: "
            "give 1, 2, 4, 7, 14 or 28"
        )
    if round(settings["embed_dim"] * settings["mlp_ratio"]) < 1:
        raise UserError(f"--mlp_ratio {settings['mlp_ratio']} leaves the MLP no neuron: raise it")
    if settings["pos_embed"] == "sincos2d" and settings["embed_dim"] % 4 != 0:
        raise UserError(
            f"--embed_dim {settings['embed_dim']} is not divisible by 4, as --pos_embed sincos2d "
            "wants it: change one of them"
        )
    if settings["embed_dim"] % settings["num_heads"] != 0:
        raise UserError(
            f"--embed_dim {settings['embed_dim']} is not divisible by "
            f"--num_heads {settings['num_heads']}: change one of them"
        )
    return settings


@dataclass
class Totals:
    """Sums over the steps of an epoch that are done; those over images are of this process's."""

    sums: Tensor  # (2,): loss and hits, over images
    grad_norm: Tensor
    first_bad: Tensor  # on a GPU, the first step that was not finite, from 1; 0: none
    lrs: list[float]  # by parameter group
    images: int = 0
    steps: int = 0
    skipped: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def of_nothing(cls, optimizer: Optimizer, device: torch.device) -> "Totals":
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        first_bad = torch.zeros((), dtype=torch.int64, device=device)
        return cls(sums, sums.new_zeros(()), first_bad, [0.0] * len(optimizer.param_groups))

    def check(self) -> None:
        """Raise NotFiniteError if a step was not finite; waits for a GPU."""
        if step := int(self.first_bad):
            raise NotFiniteError(step)

    def row(self, optimizer: Optimizer, world: World) -> dict[str, Any]:
        """A part of history.json's row: means over all processes' images, `train_loss` and
        `train_acc` (top-1 %), and over the steps, `grad_norm` (before clipping) and `lr` (by
        parameter group)."""
        loss, hits, images = self._of_all(world)
        names = [group.get("name", "all parameters") for group in optimizer.param_groups]
        used = self.steps - len(self.skipped)
        return {
            "train_loss": loss / images if images else math.nan,
            "train_acc": 100.0 * hits / images if images else math.nan,
            "grad_norm": self.grad_norm.item() / used if used else math.nan,
            "lr": {name: lr / self.steps for name, lr in zip(names, self.lrs, strict=True)},
            **({"skipped_steps": self.skipped} if self.skipped else {}),
        }

    def _of_all(self, world: World) -> list[float]:
        images = self.sums.new_tensor([self.images])
        return world.sum(torch.cat((self.sums, images))).tolist()

    def state_dict(self, world: World) -> dict[str, Any]:
        """Plain numbers, of all processes together."""
        return {
            "sums": self._of_all(world),
            "grad_norm": self.grad_norm.item(),
            "lrs": list(self.lrs),
            "steps": self.steps,
            "skipped": list(self.skipped),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any], world: World) -> None:
        loss, hits, images = (float(value) * world.leads for value in state["sums"])
        self.sums.copy_(torch.tensor([loss, hits], dtype=torch.float64))
        self.images = int(images)
        self.grad_norm.fill_(state["grad_norm"])
        self.lrs = [float(lr) for _, lr in zip(self.lrs, state["lrs"], strict=True)]
        self.steps, self.seconds = int(state["steps"]), float(state["seconds"])
        self.skipped = [int(step) for step in state["skipped"]]


class NotFiniteError(Exception):
    """The loss or the gradient of a step, counted from 1, is infinite or not a number.

    Args:
        numbers: of that step, where they are known: a GPU is asked later.
    """

    def __init__(self, step: int, **numbers: float) -> None:
        super().__init__(", ".join(f"{name} {value:g}" for name, value in numbers.items()))
        self.step, self.numbers = step, numbers


def train_steps(
    network: Callable[[Tensor], Tensor],
    loader: BatchLoader,
    criterion: nn.Module,
    optimizer: Optimizer,
    schedule: optim.Schedule,
    averaged: optim.WeightAverage,
    totals: Totals,
    *,
    grad_clip: float,
    precision: str,
    grad_accum_steps: int = 1,
    on_nonfinite: str = "stop",
    world: World = ALONE,
    description: str = "",
) -> Iterator[NotFiniteError | None]:
    """One pass over the training images, or what `totals` says is left of it; yields after each
    step, when all is at rest and could be saved, None or why the step was skipped.

    Args:
        network: the model, in training mode, or what wraps it.
        totals: added to.

    Raises:
        NotFiniteError: a step's loss or gradient is not finite and they are not to be skipped. On a
            CPU that step has changed nothing; a GPU is asked every 20 steps only.
    """
    device = loader.split.images.device
    asks_always = device.type == "cpu" or on_nonfinite == "skip"
    without_sync = getattr(network, "no_sync", nullcontext)  # of gradients, between processes

    def forward_backward(images: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """The gradient of the mean loss over the whole batch, of which this process has a part."""
        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        hits = torch.zeros((), dtype=torch.int64, device=device)
        parts = zip(
            images.tensor_split(grad_accum_steps),
            labels.tensor_split(grad_accum_steps),
            strict=True,
        )
        for i, (x, y) in enumerate(parts, 1):
            with without_sync() if i < grad_accum_steps else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    logits = network(x).float()
                # Of an empty part, at the end of an epoch, the mean would be no number.
                share = criterion(logits, y) * (len(y) / batch_size) if len(y) else logits.sum()
                (share * world.size).backward()  # the mean over processes follows
            loss += share.detach()
            hits += (logits.detach().argmax(dim=1) == y).sum()
        return loss, hits

    bar = tqdm(
        loader,
        desc=description,
        unit="batch",
        leave=False,
        initial=totals.steps,
        total=len(loader),
        disable=None if world.leads else True,
    )
    for images, labels in bar:
        batch_size = loader.size_of(totals.steps)
        rates = [group["lr"] for group in optimizer.param_groups]
        loss, hits = forward_backward(images, labels, batch_size)
        closure = optim.needs_closure(optimizer)
        # LBFGS makes passes of its own beside this one, on gradients as they are.
        grad_norm = optim.clip_gradients(optimizer, 0.0 if closure else grad_clip)

        finite = world.all(torch.isfinite(loss) & torch.isfinite(grad_norm))
        totals.steps += 1
        bad = None
        if asks_always and not finite:
            whole_loss = world.sum(loss.clone()).item()
            numbers = {"loss": whole_loss, "grad_norm": grad_norm.item(), "lr": rates[0]}
            bad = NotFiniteError(totals.steps, **numbers)
            if on_nonfinite == "stop":
                raise bad
            totals.skipped.append(totals.steps)
        else:
            if closure:
                again = partial(forward_backward, images, labels, batch_size)
                optimizer.step(lambda again=again: world.sum(again()[0]))
            else:
                optimizer.step()
            averaged.step_batch()
            # Summed on the device: Python waits for a GPU only where the bar wants a number.
            totals.sums += torch.stack((loss.double() * batch_size, hits.double()))
            totals.images += len(labels)
            totals.grad_norm += grad_norm
        schedule.step_batch()  # also after a skipped step: the run keeps its length
        totals.lrs = [total + rate for total, rate in zip(totals.lrs, rates, strict=True)]

        if not asks_always:
            first = (totals.first_bad == 0) & ~finite
            totals.first_bad = torch.where(first, totals.steps, totals.first_bad)
            if totals.steps % 20 == 0 or totals.steps == len(loader):
                totals.check()
        if not bar.disable and totals.steps % 20 == 1:
            bar.set_postfix(loss=f"{loss.item() * world.size:.4f}")
        yield bad


def main() -> None:
    args, given = parse_args()
    world = distributed.find_world()
    device = distributed.device_of(world, choose_device(args.device))
    state = None
    if args.resume is not None:
        source = Path(args.resume) if args.resume else args.save_dir
        if "save_dir" not in given:
            args.save_dir = source if source.is_dir() else source.parent
        if world.leads:  # the file needn't be on the others' machines
            state, source = resume.load_last(source)
            for name, path in resume.find_paths(source, state["run"], given).items():
                setattr(args, name, path if name == "data_dir" else Path(path))
                given[name] = getattr(args, name)
    if world.leads:
        for name in (resume.BEST, "history.json", f"timing_{device.type}.txt"):
            check_writable(args.save_dir / name)
        check_writable(args.output_dir / "training_curves.png")
        check_writable(args.todo_path)
    keep_memory()
    with (
        held(args.save_dir) if world.leads else nullcontext(),
        distributed.joined(world, device),
    ):
        if args.resume is None and world.leads:
            resume.note_unfinished(args.save_dir)
        elif args.resume is not None:
            state, source, given = world.share((state, source, given))
            run, settings = parse_args(resume.as_flags(state["run"]))
            save_dir = args.save_dir
            args, given = resume.merge(run, given, source), {**settings, **given}
            args.save_dir, args.resume = save_dir, source
        train(args, given, device, world, state)


def train(
    args: argparse.Namespace,
    given: dict[str, Any],
    device: torch.device,
    world: World,
    state: dict[str, Any] | None,
) -> None:
    """The recipe, from the data to the report.

    Args:
        given: the flags that win over recipe and data set.
        state: what a run has left in its last.pt, to go on from; None: start.
    """
    precision = choose_precision(args.precision, device)
    best_path, history_path = args.save_dir / resume.BEST, args.save_dir / "history.json"
    timing_path = args.save_dir / f"timing_{device.type}.txt"
    curves_path = args.output_dir / "training_curves.png"
    last_path = args.save_dir / resume.LAST

    # ------------------------------------------------------------------------------------ data
    likely = "mnist" if args.dataset == "auto" else args.dataset
    settings = settings_for(args.recipe, likely, given)  # refuses now what would fail later
    if state is None:
        optim.refuse_unused(settings, given)
        if likely == "digits" and "data_dir" in given:
            raise UserError(
                f"--data_dir {args.data_dir} has no effect: the digits come with scikit-learn; "
                "leave it out"
            )
    # Who names a folder wants what is in it, and no digits in its place.
    dataset = load_in_turn(likely if "data_dir" in given else args.dataset, args.data_dir, world)
    settings = settings_for(args.recipe, dataset.name, given)
    run = {name: getattr(args, name) for name in resume.OF_THE_RUN}
    run |= {"dataset": dataset.name, "settings": dict(settings)}
    run["fingerprint"] = state["run"]["fingerprint"] if state else fingerprint(run)
    train_loader, val_loader, test_loader = make_loaders(
        dataset,
        settings["batch_size"],
        args.num_workers,
        device=device,
        seed=args.seed,
        train_samples=args.train_samples,
        augment=Augment(**{field.name: settings[field.name] for field in fields(Augment)}),
        world=world,
    )

    # ----------------------------------------------------------------------------------- model
    resume.seed_generators(args.seed)
    model_config = {
        "img_size": 28,
        "in_chans": 1,
        "num_classes": len(dataset.class_names),
        **{name: settings[name] for name in MODEL_SETTINGS},
    }
    model = ViT(**model_config).to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=settings["label_smoothing"])

    # ------------------------------------------------------------------------------- optimizer
    optimizer = optim.build_optimizer(
        settings["optimizer"],
        model,
        **{name: settings[name] for name in ("lr", "weight_decay", "head_lr", "no_decay")},
    )
    # A rate or decay in the call itself wins over the flags': keep what is really used.
    first_group = optimizer.param_groups[0]
    settings["lr"], settings["weight_decay"] = first_group["lr"], first_group.get("weight_decay")
    schedule = optim.build_scheduler(
        settings["scheduler"],
        optimizer,
        epochs=settings["epochs"],
        steps_per_epoch=len(train_loader),
        interval=settings["scheduler_interval"],
        warmup_epochs=settings["warmup_epochs"],
        swa_start=settings["swa_start"],
        swa_lr=settings["swa_lr"],
        swa_anneal_epochs=settings["swa_anneal_epochs"],
        swa_anneal_strategy=settings["swa_anneal_strategy"],
    )
    averaged = optim.WeightAverage(
        model, ema_decay=settings["ema_decay"], swa_start=settings["swa_start"]
    )

    sizes = [f"{len(loader.split):,}" for loader in (train_loader, val_loader, test_loader)]
    print(f"data:     {dataset.name}, {' / '.join(sizes)} images to train, validate, test")
    print(f"model:    ViT, {count_parameters(model):,} parameters")
    processes = f", {world.size} processes" if world.size > 1 else ""
    print(f"device:   {describe_device(device)}{processes}, {precision}, seed {args.seed}")
    if device.type == "cpu" and world.size == 1:
        startup.note_busy_cores(torch.get_num_threads())
    shown = {n: v for n, v in settings.items() if v is not None and n not in SHOWN_AS_CALLS}
    print(f"recipe:   {args.recipe}: {', '.join(f'{n} {v}' for n, v in shown.items())}")
    print(f"steps:    {optimizer.text}; {schedule}")

    history = {
        "dataset": dataset.name,
        "fingerprint": run["fingerprint"],
        "settings": {
            "recipe": args.recipe,
            **settings,
            "optimizer": optimizer.text,
            "scheduler": schedule.text,
            "scheduler_interval": schedule.interval,
            "seed": args.seed,
            "train_samples": args.train_samples,
        },
        "device": describe_device(device),
        "processes": world.size,
        "precision": precision,
        "parameters": count_parameters(model),
        "versions": versions(),
        "epochs": [],
        "test": None,
    }
    about = {  # what it takes, beside the weights, to use the model
        "model_config": model_config,
        "normalization": {"mean": dataset.mean, "std": dataset.std},
        "dataset": dataset.name,
        "class_names": list(dataset.class_names),
        "fingerprint": run["fingerprint"],
        "settings": history["settings"],
        "versions": history["versions"],
    }

    # ---------------------------------------------------------------------------- where it goes on
    epochs_done, best_acc, best_epoch = 0, -1.0, 0
    totals = Totals.of_nothing(optimizer, device)
    if world.rank:  # the weights are drawn alike in all processes, dropout is not to be
        resume.seed_generators(args.seed + world.rank)
    if state is not None:
        with resume.refusing(args.resume):
            resume.restore(state, model, averaged, optimizer, schedule, device, world)
            totals.load_state_dict(state["position"]["totals"], world)
        epochs_done, history["epochs"] = state["position"]["epoch"], state["history"]
        train_loader.epoch, train_loader.skip = epochs_done, totals.steps
        best_acc, best_epoch = state["best"]["acc"], state["best"]["epoch"]
        if world.leads and epochs_done:  # a stop between two files leaves one behind
            best_acc, best_epoch = resume.bring_best(state, args.resume, best_path)
            write_json(history_path, history)
            reset_todo_md(settings["epochs"], args.todo_path, dataset.name, history["epochs"])
        best_acc, best_epoch = world.share((best_acc, best_epoch))
        print(f"resumed:  {args.resume}, after {epochs_done} epochs and {totals.steps} steps")

    def usable() -> dict[str, Any]:
        """What every checkpoint holds: a model, and what it takes to use it and train it on."""
        return {
            "epoch": epochs_done,
            "model_state_dict": averaged.module.state_dict(),
            **({"raw_model_state_dict": model.state_dict()} if averaged.active else {}),
            "optimizer_state_dict": optimizer.state_dict(),
            "scheduler_state_dict": schedule.state_dict(),
            "best_acc": best_acc,
            **about,
        }

    # Of this run in this folder: what is there of another is not kept as the save before.
    is_first_save = state is None or args.resume.resolve().parent != args.save_dir.resolve()

    def save_last() -> None:
        """Everything into last.pt, from all processes."""
        nonlocal is_first_save
        totals.check()
        totals_of_all = totals.state_dict(world)
        generators = world.gather(resume.random_state(device))
        if world.leads:
            content = {
                **usable(),
                "raw_model_state_dict": model.state_dict(),
                "average_state_dict": averaged.state_dict(),
                "run": run,
                "position": {"epoch": epochs_done, "step": totals.steps, "totals": totals_of_all},
                "best": {"epoch": best_epoch, "acc": best_acc},
                "history": history["epochs"],
                "random": generators,
            }
            with uninterrupted():
                resume.save_last(args.save_dir, content, args, first=is_first_save)
        is_first_save = False
        world.share(None)  # none goes on before it is written

    def keep_batch(epoch: int, bad: NotFiniteError) -> Path:
        """Write the batch of a step that was not finite, to be looked at."""
        path = args.save_dir / "nonfinite.pt"
        if world.leads:
            images, labels = train_loader.batch_of_all(epoch - 1, bad.step - 1)
            content = {"epoch": epoch, "step": bad.step, **bad.numbers}
            content |= {"images": images, "labels": labels, "model_state_dict": model.state_dict()}
            save_checkpoint(path, content)
        return path

    flags_to_go_on = resume.flags_to_go_on(args, parse_args([])[0], last_path)

    def stop_here(number: int) -> None:
        raise Stopped(
            f"stopped by {signal.Signals(number).name} after {epochs_done} of {settings['epochs']} "
            f"epochs and {totals.steps} steps, all saved; to go on, run this again with: "
            f"{flags_to_go_on}",
            number,
        )

    # ------------------------------------------------------------------------------------ loop
    batch_size = min(settings["batch_size"], len(train_loader.split))
    sample = torch.zeros(batch_size, 1, 28, 28, device=device)
    undivided = world.size == 1 and args.grad_accum_steps == 1
    before = time.perf_counter()
    if undivided:
        network = compile_network(model, args.compile, sample, precision)
    elif args.compile == "on":
        raise UserError("--compile on serves one process without --grad_accum_steps: leave it out")
    else:
        network = world.wrap(model)
    compile_seconds = time.perf_counter() - before  # a part of the first epoch, not of its rate
    totals.seconds += compile_seconds
    agreement = distributed.Agreement(world)
    with StopSignals(repeats_within=0.3 if world.size > 1 else 0.0) as stop:
        try:
            for epoch in range(epochs_done + 1, settings["epochs"] + 1):
                start = time.perf_counter() - totals.seconds
                model.train()
                steps = train_steps(
                    network,
                    train_loader,
                    criterion,
                    optimizer,
                    schedule,
                    averaged,
                    totals,
                    grad_clip=settings["grad_clip"],
                    precision=precision,
                    grad_accum_steps=args.grad_accum_steps,
                    on_nonfinite=args.on_nonfinite,
                    world=world,
                    description=f"epoch {epoch}/{settings['epochs']}",
                )
                with closing(steps):  # and its progress bar, also where a stop cuts it short
                    for bad in steps:
                        if bad:
                            path = keep_batch(epoch, bad)
                            note = f"note: step {bad.step} of epoch {epoch} skipped: {bad}"
                            tqdm.write(f"{note}; the latest such batch: {path}", file=sys.stderr)
                        stop_number = agreement.after_step(stop.received)
                        if totals.steps == len(train_loader):
                            continue  # saved below
                        every = args.save_every_steps
                        if stop_number or (every and totals.steps % every == 0):
                            totals.seconds = time.perf_counter() - start
                            save_last()
                        if stop_number:
                            stop_here(stop_number)
                row = totals.row(optimizer, world)
                train_seconds = time.perf_counter() - start - compile_seconds
                averaged.step_epoch(epoch, train_loader, device)
                val_loss, val_acc, val_top5 = evaluate(
                    averaged.module, val_loader, criterion, device, world
                )
                finite = all(map(math.isfinite, (row["train_loss"], row["grad_norm"], val_loss)))
                if not finite or max(p.abs().max() for p in model.parameters()) > MAX_WEIGHT:
                    raise UserError(
                        f"loss, gradient or weights are out of all bounds after epoch {epoch}: "
                        "start again with a lower learning rate or --grad_clip; the best model so "
                        "far is kept"
                    )
                schedule.step_epoch(val_loss)
                seconds = time.perf_counter() - start

                # ------------------------------------------------------------------ checkpoint
                if epoch == settings["swa_start"]:
                    best_acc = -1.0  # from here on it is the average that is to be the best
                is_best, is_first_best = val_acc > best_acc, not best_epoch
                best_acc, best_epoch = (val_acc, epoch) if is_best else (best_acc, best_epoch)
                epochs_done, totals = epoch, Totals.of_nothing(optimizer, device)
                compile_seconds = 0.0
                history["epochs"].append(
                    {
                        "epoch": epoch,
                        **row,
                        "val_loss": val_loss,
                        "val_acc": val_acc,
                        "val_top5": val_top5,
                        "is_best": is_best,
                        "finished": timestamp(),
                        "seconds": seconds,
                        "images_per_second": len(train_loader.split) / train_seconds,
                    }
                )
                with uninterrupted():
                    if is_best and world.leads:  # before last.pt, which counts on it
                        if is_first_best:
                            resume.set_aside(args.save_dir, about)
                        if epoch == settings["swa_start"]:
                            resume.keep_raw_best(best_path, epoch)
                        save_checkpoint(best_path, usable())
                    save_last()
                    if world.leads:
                        write_json(history_path, history)
                        if epoch == 1:  # not before: until then it is an earlier run's
                            reset_todo_md(settings["epochs"], args.todo_path, dataset.name)
                        update_todo_md(epoch, row["train_loss"], val_acc, is_best, args.todo_path)
                print(
                    f"Epoch {epoch:2d}/{settings['epochs']}  "
                    f"Train Loss: {row['train_loss']:.4f}  Acc: {row['train_acc']:.2f} %  |  "
                    f"Val Loss: {val_loss:.4f}  Acc: {val_acc:.2f} %  Top-5: {val_top5:.2f} %  |  "
                    f"lr {next(iter(row['lr'].values())):.1e}  {seconds:.1f} s"
                )
                if is_best:
                    print(f"          best so far, saved to {best_path}")
                if stop_number := agreement.after_step(stop.received):
                    stop_here(stop_number)
        except NotFiniteError as bad:
            path = keep_batch(epoch, bad)
            numbers = f": {bad}" if bad.numbers else ""
            raise UserError(
                f"step {bad.step} of epoch {epoch} is not finite{numbers}; "
                f"its batch is in {path}, the last save is untouched; start again with a lower "
                "learning rate or --grad_clip, or go on with --resume --on_nonfinite skip"
            ) from None
        except Stopped:
            raise
        except KeyboardInterrupt:
            go_on = f"run this again with: {flags_to_go_on}"
            saved = (
                "nothing was saved" if is_first_save else f"to go on from the last save, {go_on}"
            )
            raise KeyboardInterrupt(f"interrupted; {saved}") from None

    # ---------------------------------------------------------------------------------- report
    best_model = world.share(load_checkpoint(best_path)[0] if world.leads else None).to(device)
    if world.leads:
        calibration = confidence.fit(best_model, train_loader.split, val_loader)
        with uninterrupted():
            save_checkpoint(best_path, {**read_checkpoint(best_path), "calibration": calibration})
    test_loss, test_acc, test_top5 = evaluate(best_model, test_loader, criterion, device, world)
    history["test"] = {
        "loss": test_loss,
        "top1": test_acc,
        "top5": test_top5,
        "best_val_acc": best_acc,
        "best_epoch": best_epoch,
    }
    total_seconds = sum(row["seconds"] for row in history["epochs"])
    timing = {
        "device": describe_device(device),
        "epochs": settings["epochs"],
        "batch_size": settings["batch_size"],
        "total_train_time": f"{total_seconds:.2f}",
        "avg_time_per_epoch": f"{total_seconds / settings['epochs']:.2f}",
        "best_val_acc": f"{best_acc:.2f}",
        "test_acc": f"{test_acc:.2f}",
        "test_top5": f"{test_top5:.2f}",
        "dataset": dataset.name,
        "fingerprint": run["fingerprint"],
    }
    if world.leads:
        with uninterrupted():
            write_json(history_path, history)
            write_text(timing_path, "".join(f"{key}: {value}\n" for key, value in timing.items()))
            figures.save(figures.training_curves(history), curves_path)
    cli.print_test_result(dataset.name, test_loss, test_acc, test_top5)
    print(f"Best Val Acc: {best_acc:.2f} % @ Epoch {best_epoch}")
    print(
        f"Time: {total_seconds:.1f} s in all, {total_seconds / settings['epochs']:.1f} s an epoch, "
        f"{settings['epochs'] * len(train_loader.split) / total_seconds:.0f} images/s"
    )
    print(f"Written: {best_path}, {history_path}, {timing_path}, {curves_path}, {args.todo_path}")


if __name__ == "__main__":
    cli.run(main)
