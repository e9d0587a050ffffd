"""The optimizer from the call a user writes as text, and the clipping of gradients.

python src/optim.py --list      every name with its arguments and defaults
python src/optim.py --plot      a picture of all schedules, or of the one given by --scheduler
"""

import common.startup  # noqa: F401 before PyTorch

from common import cli
from optimizers.flags import parse_args

if __name__ == "__main__":
    cli.check_flags(parse_args)

import argparse
import itertools
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import LBFGS, Optimizer, lr_scheduler

from common.errors import UserError
from optimizers.calls import (
    OPTIMIZERS,
    SCHEDULERS,
    Call,
    describe_signature,
    naming,
    parse_call,
    signature_of,
)
from optimizers.gallery import GALLERY, panel
from optimizers.muon import MuonWithAdamW
from optimizers.schedule import FROM_RUN, Schedule, build_scheduler
from settings import Settings
from vit_model import ViT

MAX_HISTORY = 1000  # LBFGS's history_size; each entry is as large as the model


def build_optimizer(
    text: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    head_lr: float | None = None,
    no_decay: bool = False,
    layer_decay: float = 1.0,
) -> Optimizer:
    """The optimizer that `text` calls for, on the parameters of `model` that learn.

    `lr` and `weight_decay` are used where the text does not set them and the optimizer has them.
    `head_lr` is the rate of the parameters under `head.`; `no_decay` exempts biases, norms, CLS
    token and position embedding from weight decay. `layer_decay` multiplies the rate once for each
    layer below the topmost (see `_layer`). Where there are several groups, each has its `name`.

    Muon gets the weight matrices under `blocks.`, with a rate of 0.02 where the text sets none, and
    takes the packed projection for query, key and value as three; all else is AdamW's, with `lr`
    and `weight_decay`.

    The optimizer's `text` is the call with what was filled in, for Muon with AdamW's beside it; its
    `base_lr` the first group's rate, before a schedule changes it. Raises UserError if `text` is
    not a call of a known optimizer, or this refuses its arguments.
    """
    call = parse_call(text, OPTIMIZERS)
    _refuse_misuse(call, head_lr, layer_decay)
    known, is_muon = signature_of(call.cls).parameters, call.cls is torch.optim.Muon
    filled = {"lr": 0.02 if is_muon else lr, "weight_decay": weight_decay}
    filled = {name: value for name, value in filled.items() if name in known}
    call = Call(call.cls, filled | call.arguments)
    # What --no_decay spares is AdamW's beside Muon.
    if no_decay and not (weight_decay if is_muon else call.arguments.get("weight_decay")):
        raise UserError(f"--no_decay: {call.cls.__name__} has no weight decay here, leave it out")
    groups = _parameter_groups(model, head_lr, no_decay, is_muon, by_layer=layer_decay != 1)
    _set_clipping(groups, call)

    arguments = {k: v for k, v in call.arguments.items() if not k.startswith("clip_grad_")}
    device = next(model.parameters()).device
    # Adagrad's fused implementation is for CPUs alone in older releases.
    can_fuse = device.type in (("cpu",) if call.cls is torch.optim.Adagrad else ("cpu", "cuda"))
    if can_fuse and "fused" in known and "fused" not in arguments and not arguments.get("foreach"):
        arguments["fused"] = True  # else PyTorch chooses itself, which a False would keep it from
    with naming(call):
        _rehearse(call.cls, arguments, device)
        if is_muon:
            named = model.named_parameters()
            arguments["packed"] = {p: 3 for n, p in named if n.endswith("in_proj_weight")}
            adamw = {"lr": lr, "weight_decay": weight_decay, "fused": can_fuse or None}
            optimizer = MuonWithAdamW(groups, muon=arguments, adamw=adamw)
        else:
            optimizer = call.cls(groups, **arguments)
    for group in optimizer.param_groups:
        if "below" in group:
            group["lr"] *= layer_decay ** group.pop("below")
    optimizer.text, optimizer.base_lr = str(call), optimizer.param_groups[0]["lr"]
    if is_muon:
        optimizer.text += f" on the blocks' matrices, AdamW({lr=}, {weight_decay=}) on the rest"
    return optimizer


def build_optimizer_and_schedule(
    settings: Settings, model: nn.Module, steps_per_epoch: int
) -> tuple[Optimizer, Schedule]:
    """What `settings.optimizer` and `settings.scheduler` call for, with their related flags."""
    optimizer = build_optimizer(
        settings.optimizer,
        model,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        head_lr=settings.head_lr,
        no_decay=settings.no_decay,
        layer_decay=settings.layer_decay,
    )
    schedule = build_scheduler(
        settings.scheduler,
        optimizer,
        epochs=settings.epochs,
        steps_per_epoch=steps_per_epoch,
        interval=settings.scheduler_interval,
        warmup_epochs=settings.warmup_epochs,
        swa_start=settings.swa_start,
        swa_lr=settings.swa_lr,
        swa_anneal_epochs=settings.swa_anneal_epochs,
        swa_anneal_strategy=settings.swa_anneal_strategy,
    )
    return optimizer, schedule


def _refuse_misuse(call: Call, head_lr: float | None, layer_decay: float) -> None:
    """Refuse what PyTorch accepts but this project cannot use, or has no memory for."""
    if call.cls is torch.optim.SparseAdam:
        raise UserError("SparseAdam needs sparse gradients and this model has none: take Adam")
    if call.cls is LBFGS:
        if not 1 <= call.arguments.get("history_size", 1) <= MAX_HISTORY:
            raise UserError(f"{call}: history_size is not from 1 to {MAX_HISTORY}")
        if call.arguments.get("max_iter", 1) < 1:
            raise UserError(f"{call}: max_iter is not at least 1")
        if {"clip_grad_max_norm", "clip_grad_norm_type"} & call.arguments.keys():
            raise UserError(
                f"{call}: LBFGS learns from gradients as they are; they are not clipped"
            )
        for flag, is_set in (("head_lr", head_lr is not None), ("layer_decay", layer_decay != 1)):
            if is_set:
                raise UserError(f"--{flag}: LBFGS takes all parameters as one group, leave it out")


def _parameter_groups(
    model: nn.Module, head_lr: float | None, no_decay: bool, is_muon: bool, by_layer: bool
) -> list[dict[str, Any]]:
    """The parameters that learn, sorted out; with `by_layer`, from the topmost layer down, each
    group with how many layers it lies `below` that."""
    top = len(getattr(model, "blocks", ())) + 1
    sorted_out: dict[tuple[bool, bool, int, bool], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        matrix = is_muon and name.startswith("blocks.") and p.ndim == 2
        head = head_lr is not None and name.startswith("head.")
        below = top - _layer(name, top) if by_layer else 0
        bare = no_decay and (p.ndim < 2 or name in ("cls_token", "pos_embed"))
        sorted_out.setdefault((matrix, head, below, bare), []).append(p)
    if is_muon and not any(matrix for matrix, *_ in sorted_out):
        raise UserError("Muon updates the weight matrices under blocks. and this model has none")
    if head_lr is not None and not any(head for _, head, *_ in sorted_out):
        raise UserError("--head_lr is for the parameters under head. and this model has none")

    groups = []
    for (matrix, head, below, bare), params in sorted(sorted_out.items(), key=lambda item: item[0]):
        group = {"params": params}
        if len(sorted_out) > 1:
            name = "matrices" if matrix else "head" if head else "body"
            if by_layer and not head:
                topmost = "norm and head" if head_lr is None else "norm"
                layer = {0: topmost, top: "patches"}.get(below, f"block {top - below}")
                name = f"{layer}, matrices" if matrix else layer
            group["name"] = name + (", no decay" if bare else "")
        group |= {"muon": matrix} if is_muon else {}
        group |= {"lr": head_lr} if head else {}
        group |= {"below": below} if below else {}
        group |= {"weight_decay": 0.0} if bare else {}
        groups.append(group)
    return groups


def _layer(name: str, top: int) -> int:
    """Where a parameter lies: 0 are patches, CLS token and positions, then come the blocks from 1,
    then, at `top`, the final norm and the head (Bao et al., "BEiT", 2022, appendix)."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(("patch_embed.", "cls_token", "pos_embed")) else top


def _set_clipping(groups: list[dict[str, Any]], call: Call) -> None:
    """Give the groups the call's `clip_grad_max_norm`; a list has a value for each of them."""
    max_norms = call.arguments.get("clip_grad_max_norm")
    norm_type = call.arguments.get("clip_grad_norm_type")
    max_norms = max_norms if isinstance(max_norms, list) else [max_norms] * len(groups)
    norm_type = 2.0 if norm_type is None else math.inf if norm_type == "inf" else norm_type
    if len(max_norms) != len(groups):
        raise UserError(f"{call}: {len(groups)} parameter groups, but {len(max_norms)} norms")
    if isinstance(norm_type, str) or norm_type <= 0:
        raise UserError(f"{call}: clip_grad_norm_type is neither a number above 0 nor 'inf'")
    for group, max_norm in zip(groups, max_norms, strict=True):
        if max_norm is not None and max_norm <= 0:
            raise UserError(f"{call}: clip_grad_max_norm is not above 0")
        if max_norm is not None:
            group.update(clip_grad_max_norm=max_norm, clip_grad_norm_type=norm_type)


def _rehearse(cls: type[Optimizer], arguments: dict[str, Any], device: torch.device) -> None:
    """One step on a 2 x 2 matrix: some classes refuse their arguments only there."""
    weight = nn.Parameter(torch.ones(2, 2, device=device))
    if "max_iter" in signature_of(cls).parameters:
        arguments = arguments | {"max_iter": 1}

    def closure() -> Tensor:
        with torch.enable_grad():
            loss = weight.square().sum()
        loss.backward()
        return loss

    cls([weight], **arguments).step(closure)


def clip_gradients(optimizer: Optimizer, grad_clip: float) -> Tensor:
    """Clip the gradients in place; the result is their total 2-norm before, left on their device.

    Groups with a `clip_grad_max_norm` are clipped each by its own norm of type
    `clip_grad_norm_type`, the others together, by their global norm, to `grad_clip` (0: not at
    all). Those of LBFGS stay as they are: it learns the curvature from their differences.
    """
    if isinstance(optimizer, LBFGS):
        grad_clip = 0.0
    own = [group for group in optimizer.param_groups if "clip_grad_max_norm" in group]
    rest = [group for group in optimizer.param_groups if "clip_grad_max_norm" not in group]
    shared = [p for group in rest for p in group["params"]]
    if grad_clip and not own:
        return clip_grad_norm_(shared, grad_clip)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    total_norm = get_total_norm([p.grad for p in params if p.grad is not None])
    if grad_clip:
        clip_grad_norm_(shared, grad_clip)
    for group in own:
        clip_grad_norm_(group["params"], group["clip_grad_max_norm"], group["clip_grad_norm_type"])
    return total_norm


def check_calls(
    optimizer: str, scheduler: str, *, swa_lr: float | None, given: Mapping[str, Any]
) -> None:
    """Refuse texts that are no calls of known classes, and flags that have no effect beside them.

    Args:
        given: the flags that were given by hand, by name: those of a recipe may be idle.
    """
    calls = {}
    for flag, text, classes in (
        ("optimizer", optimizer, OPTIMIZERS),
        ("scheduler", scheduler, SCHEDULERS),
    ):
        try:
            calls[flag] = parse_call(text, classes)
        except UserError as error:
            raise UserError(f"--{flag}: {error}") from None
    arguments = calls["optimizer"].arguments
    is_set = {name for name, value in arguments.items() if value is not None}
    if "clip_grad_norm_type" in is_set and "clip_grad_max_norm" not in is_set:
        reason = "clip_grad_norm_type has no effect without clip_grad_max_norm: leave it out"
        raise UserError(f"--optimizer: {reason}")
    reasons = _idle_flags(calls["optimizer"], calls["scheduler"])
    if given.get("freeze") == "backbone":
        reasons |= _idle_in_a_probe(calls["optimizer"], given)
    if swa_lr is None:
        names = ("swa_anneal_epochs", "swa_anneal_strategy")
        reasons |= dict.fromkeys(names, "there is no --swa_lr to anneal to")
    for name, reason in reasons.items():
        if name in given and (name, given[name]) != ("layer_decay", 1):  # which says it is off
            raise UserError(f"--{name} {given[name]} has no effect: {reason}; leave it out")


def _idle_flags(optimizer: Call, scheduler: Call) -> dict[str, str]:
    """Flags that have no effect beside these calls, and why."""
    reasons = {}
    if optimizer.cls is not torch.optim.Muon:  # whose other half, AdamW, takes both
        for name in ("lr", "weight_decay"):
            if name in optimizer.arguments:
                reasons[name] = f"{optimizer} sets its own"
            elif name not in signature_of(optimizer.cls).parameters:
                reasons[name] = f"{optimizer.cls.__name__} has none"
    fixed = {lr_scheduler.OneCycleLR: {"max_lr"}, lr_scheduler.CyclicLR: {"base_lr", "max_lr"}}
    if scheduler.cls in fixed and fixed[scheduler.cls] <= scheduler.arguments.keys():
        names = ("lr", "head_lr", "layer_decay")
        reasons |= dict.fromkeys(names, f"{scheduler} sets all rates itself")
    max_norms = optimizer.arguments.get("clip_grad_max_norm")
    if optimizer.cls is LBFGS:
        reasons["grad_clip"] = "LBFGS learns from gradients as they are; they are not clipped"
    elif max_norms is not None and None not in (max_norms if type(max_norms) is list else []):
        reasons["grad_clip"] = f"{optimizer} clips by its own"
    return reasons


def _idle_in_a_probe(optimizer: Call, given: Mapping[str, Any]) -> dict[str, str]:
    """Flags that have no effect with --freeze backbone, and why."""
    if optimizer.cls is torch.optim.Muon:
        raise UserError(
            "Muon updates the weight matrices of the blocks, which --freeze backbone leaves as "
            "they are: give --optimizer AdamW"
        )
    reasons = {"layer_decay": "with --freeze backbone only the head learns"}
    if "head_lr" in given:
        reasons["lr"] = f"{reasons['layer_decay']}, and --head_lr is its rate"
    return reasons


# ------------------------------------------------------------------------------------ command line


def main() -> None:
    args, given = parse_args()
    if args.list:
        _list()
    if args.plot:
        _plot(args, given)


def _list() -> None:
    print("<run>: taken from the run where it is left out\n\nOptimizers")
    for cls in itertools.chain.from_iterable(OPTIMIZERS.values()):
        print("  " + describe_signature(cls, ("lr", "weight_decay")))
    print("  each but LBFGS also with clip_grad_max_norm and clip_grad_norm_type\n\nSchedules")
    for cls in itertools.chain.from_iterable(SCHEDULERS.values()):
        print("  " + describe_signature(cls, FROM_RUN.get(cls, ())))


def _plot(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Draw the schedule that the flags describe, or, without one, the gallery."""
    from analysis import figures  # only here: it imports Matplotlib

    model = ViT(embed_dim=8, depth=1, num_heads=1)
    if args.scheduler:
        check_calls(args.optimizer, args.scheduler, swa_lr=args.swa_lr, given=given)
    given_or_default = {f.name: getattr(args, f.name) for f in fields(Settings) if f.name in args}
    panels = []
    for call, flags in [(args.scheduler, {})] if args.scheduler else GALLERY:
        settings = Settings(**{**given_or_default, "scheduler": call, **flags})
        _, schedule = build_optimizer_and_schedule(settings, model, args.steps_per_epoch)
        title = " ".join([call, *(f"--{flag} {value}" for flag, value in flags.items())])
        panels.append(panel(schedule, str(schedule) if args.scheduler else title))
    if args.scheduler:
        print(panels[0]["title"])
    figures.save(figures.lr_schedules(panels), args.output)
    print(f"Written: {args.output}")


if __name__ == "__main__":
    cli.run(main)
