"""What a training run can be told: every flag with its default, bounds and help.

Each flag is one field: the command line, the checks of what a file says, and what a checkpoint
stores all come from it. Nothing here needs PyTorch, so that flags are read before it is imported.
"""

import argparse
import difflib
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from common import cli
from common.cli import integer, number, path_text
from common.errors import UserError
from data.catalog import NAMED_SETS, PREPARATIONS
from recipes import DATASET_SETTINGS, RECIPES

SECTIONS = {  # of --help, in its order
    "data": "data",
    "folder": "images of your own (--dataset folder)",
    "recipe": "recipe (the defaults of all flags below are the article's)",
    "optimization": "optimization (names: python3 launch.py optim.py --list)",
    "model": "model",
    "augmentation": "augmentation (strengths, and shares below 1; 0: off)",
    "mixing": "mixing of images (0: off)",
    "fine-tuning": "fine-tuning",
    "machine": "machine",
    "resuming": "stopping and resuming",
    "output": "what is written",
}
MAX_TOML = 20_000  # bytes: the time that a hostile one takes grows with the square of its length


def flag(section: str, default: Any, help: str, type: Callable = str, **about: Any) -> Any:
    """A field with all that is known of its flag.

    Args:
        type: a parser of text that names the bounds.
        about: `choices`, the values there are; `changes`, whether a resumed run may go on with
            another value; `stored`, whether the value belongs to the run and not to the machine.
    """
    about = {"changes": False, "stored": True, **about}
    return field(default=default, metadata=about | {"section": section, "help": help, "type": type})


data_flag, recipe_flag = partial(flag, "data"), partial(flag, "recipe")
folder_flag, model_flag = partial(flag, "folder"), partial(flag, "model")
optimization_flag = partial(flag, "optimization")
augmentation_flag = partial(flag, "augmentation")
share_flag = partial(augmentation_flag, 0.0, type=number(0, 1))
mixing_flag = partial(flag, "mixing")
finetuning_flag = partial(flag, "fine-tuning")
machine_flag = partial(flag, "machine", changes=True)
resuming_flag = partial(flag, "resuming", changes=True)
output_flag = partial(flag, "output", changes=True, stored=False)


@dataclass(frozen=True)
class Settings:
    """How a run learns. None is off, or derived."""

    epochs: int = recipe_flag(
        20, "passes over the training images", integer(1, 10**6), changes=True
    )
    batch_size: int = recipe_flag(128, "images in a step", integer(1))
    label_smoothing: float = recipe_flag(0.1, "share of a target spread evenly", number(0, 1))
    class_weights: str = recipe_flag(
        "none",
        "of the classes in the loss; auto: the rarer, the heavier",
        choices=("none", "auto"),
    )

    optimizer: str = optimization_flag("AdamW", 'a call: "SGD(momentum=0.9, nesterov=True)"')
    lr: float = optimization_flag(1e-3, "learning rate at the start", number(0, above=True))
    head_lr: float | None = optimization_flag(
        None, "learning rate of the head, None: that of --lr", number(0, above=True)
    )
    weight_decay: float = optimization_flag(1e-4, "weight decay", number(0))
    no_decay: bool = optimization_flag(False, "no decay of biases, norms, CLS token and positions")
    grad_clip: float = optimization_flag(1.0, "largest global gradient norm; 0: off", number(0))
    scheduler: str = optimization_flag("CosineAnnealingLR", 'a call: "StepLR(step_size=5)"')
    scheduler_interval: str | None = optimization_flag(
        None,
        "how often the schedule moves; None: every epoch, or step with CyclicLR and OneCycleLR",
        choices=("epoch", "step"),
    )
    warmup_epochs: int = optimization_flag(0, "linear warm-up before the schedule", integer(0))
    ema_decay: float | None = optimization_flag(
        None, "exponential average of the weights; the share kept in each step", number(0, 1)
    )
    swa_start: int | None = optimization_flag(
        None, "average the weights from the end of this epoch on", integer(1)
    )
    swa_lr: float | None = optimization_flag(
        None, "learning rate while --swa_start averages", number(0, above=True)
    )
    swa_anneal_epochs: int = optimization_flag(10, "epochs until --swa_lr is reached", integer(0))
    swa_anneal_strategy: str = optimization_flag(
        "cos", "how the rate moves to --swa_lr", choices=("cos", "linear")
    )

    patch_size: int = model_flag(
        7,
        "side of a patch in pixels; unless given, another where this doesn't divide the image's "
        "side, or makes more than 16 patches a side",
        integer(1),
    )
    embed_dim: int = model_flag(96, "width of a token", integer(1, 10**5))
    depth: int = model_flag(16, "transformer blocks", integer(1, 10**4))
    num_heads: int = model_flag(4, "attention heads; divide embed_dim", integer(1))
    mlp_ratio: float = model_flag(4.0, "MLP width over token width", number(0, 1000, above=True))
    dropout: float = model_flag(0.1, "share of values dropped in training", number(0, 1))
    pool: str = model_flag(
        "cls", "what the head reads: CLS, or the tokens' mean", choices=("cls", "mean")
    )
    pos_embed: str = model_flag("learned", "position embeddings", choices=("learned", "sincos2d"))
    patch_drop: float = model_flag(
        0.0,
        "share of the patches left out in the first two thirds of training, for speed",
        number(0, 1),
    )

    rotate: float = augmentation_flag(7.0, "degrees, at most, to either side", number(0, 181))
    translate: float = augmentation_flag(0.1, "shift, at most, in image sides", number(0, 1))
    scale: float = augmentation_flag(
        0.0, "the size varies by this share, up and down", number(0, 1)
    )
    shear: float = augmentation_flag(
        0.0, "slant in degrees, at most, to either side", number(0, 90)
    )
    elastic: float = augmentation_flag(0.0, "bending: std of the shifts in pixels", number(0, 28))
    erase: float = augmentation_flag(0.0, "share of images that lose a rectangle", number(0, 1))
    hflip: float = augmentation_flag(
        0.0,
        "share of images that are mirrored; 0.5 without a value",
        number(0, 1),
        nargs="?",
        const=0.5,
    )
    random_crop: int = augmentation_flag(
        0,
        "widen images by this many reflected pixels, then cut their size out anywhere",
        integer(0, 64),
    )
    color_jitter: float = augmentation_flag(
        0.0, "brightness, contrast and saturation vary by this share", number(0, 1)
    )
    rand_augment: int = augmentation_flag(
        0, "this many changes to each image, drawn from fourteen (RandAugment)", integer(0, 14)
    )
    stroke: float = share_flag("share of images with thicker or thinner strokes, or outlines")
    serif: float = share_flag("share of images whose straight strokes get a flag, as a 1 often has")
    marks: float = share_flag("share of images under foreign strokes or a rectangle of any shade")
    background: float = share_flag("share of images with uneven light behind them")
    light: float = share_flag("share of images with less contrast, other brightness and gamma")
    invert: float = share_flag("share of images inverted, all of it or a stripe")
    rand_conv: float = share_flag("share of images with a random convolution mixed in (RandConv)")
    blur: float = share_flag("share of images blurred or sharpened")
    noise: float = share_flag("share of images with normal noise, shot noise or impulses")
    keep_clean: float = share_flag("share of images left alone by the nine above")
    augmix: float = share_flag("share of the others mixed from several changed ones (AugMix)")

    mixup: float = mixing_flag(
        0.0, "alpha of Beta(alpha, alpha), which draws the share of a second image", number(0)
    )
    cutmix: float = mixing_flag(
        0.0, "the same for a rectangle of a second image; with mixup, one or the other", number(0)
    )

    init_from: str | None = finetuning_flag(
        None,
        "a trained ViT to start from, of this project, timm or torchvision (.pt, .pth or "
        ".safetensors); the network's sizes come with it",
        path_text,
        metavar="FILE",
    )
    freeze: str = finetuning_flag(
        "none", "backbone: only the head learns, without dropout", choices=("none", "backbone")
    )
    layer_decay: float = finetuning_flag(
        1.0,
        "the learning rate of each block as a share of the next one's; 1: one rate for all",
        number(0, 1, above=True, closed=True),
    )


@dataclass(frozen=True)
class Options:
    """What a run trains on, where it computes and what it writes."""

    data_dir: str | None = data_flag(
        None,
        "folder with the data set, or to fetch it to; None: ./mnist for mnist, else ./datasets",
        changes=True,
        stored=False,
    )
    dataset: str = data_flag(
        "auto",
        "auto: mnist, or, without --data_dir, digits where MNIST can neither be found nor "
        "downloaded; folder: images of your own, a folder of --data_dir for each class",
        choices=("auto", *DATASET_SETTINGS),
    )
    train_samples: int | None = data_flag(
        None, "train on the first N images only, for a quick look; None: on all", integer(1)
    )
    num_workers: int = data_flag(
        0, "threads that prepare batches ahead; 0: none", integer(0, 256), changes=True
    )
    img_size: int | None = folder_flag(
        None,
        "side to which images are brought, in pixels; None: their own, at most 64",
        integer(4, 1024),
    )
    in_chans: int | None = folder_flag(
        None, "1: grey, 3: colour; None: 3 if any image has colour", integer(1), choices=(1, 3)
    )
    resize: str = folder_flag(
        "crop",
        "what is done with images that are not square: their middle is taken, they are padded, or "
        "stretched",
        choices=PREPARATIONS[1:],
    )
    val_split: float | None = folder_flag(
        None,
        "share of the images to validate; None: 0.1 where there is no val folder",
        number(0, 1, above=True),
    )
    test_split: float | None = folder_flag(
        None,
        "share of the images to test; None: 0.1 where there is no test folder",
        number(0, 1, above=True),
    )
    cache_dir: str | None = folder_flag(
        None,
        "where the prepared images are kept; None: in --data_dir",
        changes=True,
        stored=False,
    )
    recipe: str = recipe_flag(
        "article",
        "a set of flags, from recipes.py: article, as published; fast, the least time to 99 %%; "
        "best, the highest accuracy in 30 minutes; robust, in 45 minutes, also for images that "
        "differ a little; cifar, for small colour photos; flags given beside it win",
        choices=tuple(RECIPES),
    )
    config: str | None = recipe_flag(
        None,
        "take the flags from a TOML file, or a run's from its history.json; flags given beside it "
        "win",
        metavar="FILE",
        changes=True,
        stored=False,
    )
    seed: int = recipe_flag(42, "of weights, order, augmentation, dropout", integer(0))
    device: str = machine_flag(
        "auto", "auto (CUDA, else CPU), cpu, cuda, cuda:N, mps", stored=False
    )
    precision: str = machine_flag(
        "auto",
        "of training's matrix products; auto: bf16 where the hardware has it",
        choices=("auto", "fp32", "bf16"),
        changes=False,
    )
    grad_accum_steps: int = machine_flag(
        1, "process each batch in this many parts: the same step in less memory", integer(1, 10**6)
    )
    compile: str = machine_flag(
        "auto", "torch.compile; auto: on CUDA", choices=("auto", "on", "off"), stored=False
    )
    resume: str | None = resuming_flag(
        None,
        "continue the run that left this last.pt, by default that in --save_dir, as if it had "
        "never stopped; its settings come with it",
        stored=False,
        nargs="?",
        const="",
        metavar="PATH",
    )
    save_every_steps: int | None = resuming_flag(
        None, "also write last.pt every N steps; None: only after each epoch", integer(1)
    )
    on_nonfinite: str = resuming_flag(
        "stop",
        "where loss or gradient is infinite or not a number: stop, or skip the step",
        choices=("stop", "skip"),
    )
    save_dir: Path = output_flag(Path("./checkpoints"), "model, history", Path)
    output_dir: Path = output_flag(Path("./outputs"), "pictures", Path)
    todo_path: Path = output_flag(Path("./TODO.md"), "progress table", Path)
    log: str = output_flag(
        "none",
        "tensorboard: numbers of every step and epoch, and pictures, in tensorboard/ of "
        "--output_dir",
        choices=("none", "tensorboard"),
    )


NOT_JSON = json.JSONDecodeError, UnicodeDecodeError  # kinds of ValueError
FLAGS: dict[str, Field] = {f.name: f for f in (*fields(Options), *fields(Settings))}


def parse_args(flags: Sequence[str] | None = None) -> tuple[Options, dict[str, Any]]:
    """The options, from the command line by default, and all flags that it or its --config names.
    Raises UserError if a flag is not known, or its value is out of bounds.
    """
    parser = cli.Parser(description="Train the Vision Transformer, from the data to the report.")
    add_flags(parser, FLAGS)
    parser.parse_args(flags)
    given = parser.given
    if "config" in given:
        given = read_config(Path(given["config"])) | given
    options = Options(**{f.name: given[f.name] for f in fields(Options) if f.name in given})
    if options.data_dir is None and options.dataset != "folder":
        data_dir = NAMED_SETS["mnist" if options.dataset == "auto" else options.dataset].data_dir
        options = replace(options, data_dir=data_dir)
    return options, given


def read_config(path: Path) -> dict[str, Any]:
    """The flags by name that a TOML file gives, or with which a `history.json`'s run would be
    started again. Raises UserError if the file can't be read, or names a flag or a value that there
    isn't.
    """
    from common.files import read_bytes  # imports filelock, which --help works without

    try:
        content, is_toml = read_bytes(path), path.suffix == ".toml"
        flags = _flags_of_toml(content) if is_toml else _flags_of_run(json.loads(content)["run"])
        # A run's file may be a stranger's, who must not choose where we write.
        known = [n for n, f in FLAGS.items() if n != "config" and (is_toml or f.metadata["stored"])]
        if unknown := [name for name in flags if name not in known]:
            close = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            raise ValueError(f"unknown flags: {', '.join(unknown)}; {hint}")
        return {name: validated(FLAGS[name], value) for name, value in flags.items()}
    except UserError as error:
        raise UserError(f"--config: {error}; name a .toml or a run's history.json") from None
    except (AttributeError, LookupError, RecursionError, TypeError, *NOT_JSON):
        raise UserError(
            f"--config {path} is neither a TOML file, whose name ends in .toml, nor the "
            "history.json of a run, as version 0.2.0 and later ones write it"
        ) from None
    except ValueError as error:
        raise UserError(f"--config {path}: {error}") from None


def _flags_of_toml(content: bytes) -> dict[str, Any]:
    if len(content) > MAX_TOML:
        raise ValueError(f"it has {len(content):,} bytes, expected at most {MAX_TOML:,}")
    return {name.replace("-", "_"): v for name, v in tomllib.loads(content.decode()).items()}


def _flags_of_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """In what a run differs from its recipe and data set: a flag without effect would be refused.

    Args:
        run: as `saving.stored_settings.to_stored` makes it.
    """
    settings = {f.name: f.default for f in fields(Settings)} | run["settings"]
    flags = {n: v for n, v in run.items() if n not in ("settings", "fingerprint")} | settings
    usual = {name: flag.default for name, flag in FLAGS.items()}
    usual |= RECIPES[run["recipe"]] | dict(DATASET_SETTINGS[run["dataset"]])
    fitted = {"ema_decay"}  # where not given, to the images or to a trained model: see `resolve`
    if run["dataset"] == "folder":
        fitted |= {"batch_size", "patch_size"}
    if flags["init_from"] is not None:
        fitted |= {"patch_size", "num_heads"}
    return {n: v for n, v in flags.items() if n in fitted or n not in usual or v != usual[n]}


def section_of(flags: "Settings | Options", name: str) -> dict[str, Any]:
    """The values of one section by name, as `ViT` takes "model" and `Augment` "augmentation"."""
    return {f.name: getattr(flags, f.name) for f in fields(flags) if f.metadata["section"] == name}


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add fields of `Settings` and `Options` to a command line, grouped by section."""
    for section, title in SECTIONS.items():
        group = parser.add_argument_group(title)
        for flag in (FLAGS[n] for n in names if FLAGS[n].metadata["section"] == section):
            wanted = ("help", "type", "choices", "nargs", "const", "metavar")
            about = {key: flag.metadata[key] for key in wanted if key in flag.metadata}
            if flag.default is False:
                about = {"help": about["help"], "action": "store_true"}
            group.add_argument(f"--{flag.name}", default=flag.default, **about)


def validated(flag: Field, value: Any) -> Any:
    """A file's `value` if the command line would take it for this flag, else an error."""
    is_switch = flag.default is False
    if value is flag.default or (is_switch and value is True):
        return value
    if is_switch or type(value) not in (int, float, str) or "\0" in str(value):
        raise ValueError(f"its {flag.name} is no value for --{flag.name}")
    try:
        value = flag.metadata["type"](str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"its {flag.name}: {error}") from None
    if value not in flag.metadata.get("choices", [value]):
        raise ValueError(
            f"its {flag.name} is none of {', '.join(map(str, flag.metadata['choices']))}"
        )
    return value


for _changes in (*RECIPES.values(), *DATASET_SETTINGS.values()):  # refused when this is imported
    for _name, _value in _changes.items():
        validated(FLAGS[_name], _value)
