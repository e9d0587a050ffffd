"""src/optim.py: groups, clipping, every optimizer's steps and state, flags, --list and --plot."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_one_error_line
from tiny_training import RUN, loss_of, one_weight, same, saved, tiny_vit, train_step
from torch import nn

import optim
from analysis import figures
from common.errors import UserError
from optim import build_optimizer, check_calls, clip_gradients
from optimizers.calls import OPTIMIZERS, SCHEDULERS
from optimizers.gallery import GALLERY
from optimizers.schedule import build_scheduler
from vit_model import ViT

PROBE = {"freeze": "backbone"}
SCRIPT = Path(__file__).parents[1] / "src" / "optim.py"


# ------------------------------------------------------------------------------------------- steps


def test_default_is_plain_adamw_to_the_bit():
    ours, plain = tiny_vit(), tiny_vit()
    a = build_optimizer("AdamW", ours, **RUN)
    b = torch.optim.AdamW(plain.parameters(), **RUN, fused=True)
    for seed in range(5):
        train_step(ours, a, seed)
        loss_of(plain, seed)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        b.step()
    assert same(ours, plain) and type(a) is torch.optim.AdamW and a.param_groups[0]["fused"]


SETTINGS = {  # where the tests' own learning rate is not enough
    "Adadelta": "Adadelta(lr=10)",
    "Adafactor": "Adafactor(lr=0.1)",
    "Adagrad": "Adagrad(lr=0.05)",
    "ASGD": "ASGD(lr=1)",
    "LAMB": "LAMB(lr=0.03)",
    "LBFGS": "LBFGS(lr=1, max_iter=4, history_size=5, line_search_fn='strong_wolfe')",
    "RAdam": "RAdam(lr=0.03)",
    "Rprop": "Rprop(lr=0.01)",
    "SGD": "SGD(lr=0.1, momentum=0.9, nesterov=True)",
}
TEXTS = [SETTINGS.get(name, name) for name in OPTIMIZERS if name != "SparseAdam"]
TEXTS += ["AdamW(do_bias_correction=False)", "RMSprop(momentum=0.9, centered=True)"]


@pytest.mark.parametrize("text", TEXTS)
def test_every_optimizer_learns_and_goes_on_bit_for_bit_after_a_save(text):
    no_decay = not text.startswith(("LBFGS", "Rprop"))  # several groups where it can have them
    model, again = tiny_vit(), tiny_vit()
    optimizer, restored = (
        build_optimizer(text, each, **RUN, no_decay=no_decay) for each in (model, again)
    )
    losses = [train_step(model, optimizer) for _ in range(25)]
    again.load_state_dict(saved(model.state_dict()))
    restored.load_state_dict(saved(optimizer.state_dict()))
    for _ in range(25):
        losses.append(train_step(model, optimizer))
        assert train_step(again, restored) == losses[-1]
    assert same(model, again)
    assert losses[-1] < 0.8 * losses[0]


# --------------------------------------------------------------------------- groups and gradients


def test_no_decay_spares_biases_norms_cls_token_and_positions():
    model = tiny_vit()
    optimizer = build_optimizer("AdamW", model, **RUN, head_lr=0.5, no_decay=True)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        group["name"]: ({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    }
    assert list(found) == ["body", "body, no decay", "head", "head, no decay"]
    block = {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.0.weight", "mlp.3.weight"}
    decayed = {"patch_embed.proj.weight"} | {f"blocks.0.{name}" for name in block}
    assert found["body"] == (decayed, 0.01, 0.01)
    assert found["head"] == ({"head.weight"}, 0.5, 0.01)
    assert found["head, no decay"] == ({"head.bias"}, 0.5, 0.0)
    assert {"cls_token", "pos_embed", "norm.weight"} <= found["body, no decay"][0]
    assert found["body, no decay"][2] == 0.0
    assert sum(len(members) for members, _, _ in found.values()) == len(names)


def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer.param_groups
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


def three_blocks() -> ViT:
    return ViT(img_size=8, patch_size=4, embed_dim=8, depth=3, num_heads=2)


def layer(name: str) -> int:
    """Counted as BEiT's appendix does, for three blocks."""
    block = re.match(r"blocks\.(\d)\.", name)
    return 1 + int(block[1]) if block else 4 if name.startswith(("norm", "head")) else 0


@pytest.mark.parametrize("text", ["AdamW", "SGD(lr=0.01, momentum=0.9)", "LAMB"])
@pytest.mark.parametrize("no_decay", [False, True])
def test_layer_decay_lowers_the_rate_by_a_power_a_layer(text, no_decay):
    model = three_blocks()
    optimizer = build_optimizer(text, model, **RUN, no_decay=no_decay, layer_decay=0.5)
    found = rates(optimizer, model)
    assert found == {n: 0.01 * 0.5 ** (4 - layer(n)) for n, _ in model.named_parameters()}
    names = [group["name"] for group in optimizer.param_groups]
    assert [name for name in names if "," not in name] == [
        *("norm and head", "block 3", "block 2", "block 1", "patches")
    ]
    assert len(set(names)) == len(names) == (10 if no_decay else 5)
    assert optimizer.base_lr == 0.01
    spared = {g["name"] for g in optimizer.param_groups if g["weight_decay"] == 0.0}
    assert spared == {name for name in names if name.endswith(", no decay")}


def test_layer_decay_leaves_a_head_of_its_own_rate_alone():
    model = three_blocks()
    optimizer = build_optimizer("AdamW", model, **RUN, head_lr=0.3, layer_decay=0.5)
    found = rates(optimizer, model)
    assert found["head.weight"] == found["head.bias"] == 0.3
    assert (found["norm.weight"], found["blocks.2.norm1.bias"]) == (0.01, 0.005)
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["norm", "block 3", "block 2", "block 1", "patches", "head"]


@pytest.mark.parametrize("text", ["Muon", "Muon(lr=0.04)"])
def test_layer_decay_holds_for_both_halves_of_muon(text):
    model = three_blocks()
    optimizer = build_optimizer(text, model, **RUN, layer_decay=0.5)
    of_muon = 0.04 if "0.04" in text else 0.02
    for name, rate in rates(optimizer, model).items():
        matrix = name.startswith("blocks.") and name.endswith(
            ("proj_weight", "j.weight", "p.0.weight", "p.3.weight")
        )
        assert rate == (of_muon if matrix else 0.01) * 0.5 ** (4 - layer(name)), name
    names = [group["name"] for group in optimizer.param_groups]
    assert names[:2] == ["norm and head", "block 3"] and names[-1] == "block 1, matrices"
    schedule = build_scheduler("OneCycleLR", optimizer, epochs=2, steps_per_epoch=5)
    assert "max_lr=[0.01, 0.005, 0.0025, 0.00125, 0.000625, " in str(schedule)


def test_layer_decay_1_is_off():
    for text in ("AdamW", "Muon"):
        model = tiny_vit()
        plain, off = (build_optimizer(text, model, **RUN, **d) for d in ({}, {"layer_decay": 1.0}))
        for a, b in zip(plain.param_groups, off.param_groups, strict=True):
            assert a.keys() == b.keys() and (a["lr"], len(a["params"])) == (
                b["lr"],
                len(b["params"]),
            )


def test_what_is_frozen_is_in_no_group():
    model = tiny_vit()
    model.requires_grad_(False).head.requires_grad_()
    for text in ("AdamW", "SGD", "LBFGS"):
        assert rates(build_optimizer(text, model, **RUN), model).keys() == {
            "head.weight",
            "head.bias",
        }


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("AdamW", {"head_lr": 0.1}, "under head. and this model has none"),
        ("Muon", {}, "under blocks. and this model has none"),
        ("LBFGS", {"head_lr": 0.1}, "--head_lr: LBFGS takes all parameters as one group"),
        ("LBFGS", {"layer_decay": 0.1}, "--layer_decay: LBFGS takes all parameters as one group"),
        ("Rprop", {"no_decay": True}, "--no_decay: Rprop has no weight decay"),
        ("AdamW(weight_decay=0)", {"no_decay": True}, "--no_decay: AdamW has no weight decay"),
    ],
)
def test_groups_that_model_or_optimizer_lacks_are_refused(text, flags, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(text, nn.Linear(2, 2), **RUN, **flags)


def test_each_group_is_clipped_by_its_own_norm_and_the_rest_together():
    a, b, c = one_weight([1, 1], [3, 4]), one_weight([1, 1], [6, -8]), one_weight([1], [2.4])
    own = {"clip_grad_max_norm": 1.0}
    groups = [
        {"params": [a], **own, "clip_grad_norm_type": 2.0},
        {"params": [b], **own, "clip_grad_norm_type": math.inf},
        {"params": [c]},
    ]
    total = clip_gradients(torch.optim.SGD(groups, lr=1.0), 1.2)
    assert total.item() == pytest.approx(math.sqrt(25 + 100 + 2.4**2))
    assert a.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert b.grad.tolist() == pytest.approx([0.75, -1.0], rel=1e-5)
    assert c.grad.tolist() == pytest.approx([1.2], rel=1e-5)


@pytest.mark.parametrize(("cls", "grad_clip"), [("SGD", 0.0), ("LBFGS", 1.0)])
def test_without_clipping_and_with_lbfgs_gradients_stay(cls, grad_clip):
    p = one_weight([1, 1], [3, 4])
    assert clip_gradients(getattr(torch.optim, cls)([p], lr=1.0), grad_clip).item() == 5.0
    assert p.grad.tolist() == [3, 4]


def test_the_text_sets_the_clipping_of_every_group():
    text = "SGD(clip_grad_max_norm=[1, 2.5], clip_grad_norm_type='inf')"
    optimizer = build_optimizer(text, tiny_vit(), **RUN, head_lr=0.1)
    assert [g["clip_grad_max_norm"] for g in optimizer.param_groups] == [1, 2.5]
    assert all(g["clip_grad_norm_type"] == math.inf for g in optimizer.param_groups)


# ------------------------------------------------------------------------------- flags of a run


@pytest.mark.parametrize(
    ("calls", "given", "message"),
    [
        ({"optimizer": "AdmaW"}, {}, "^--optimizer: 'AdmaW' is not known; expected one of AdamW"),
        ({"scheduler": "cosine("}, {}, r"^--scheduler: 'cosine\(' is not a call"),
        ({"optimizer": "SGD(lr=0.1)"}, {"lr": 1e-5}, r"--lr 1e-05 .* SGD\(lr=0.1\) sets its own"),
        ({"optimizer": "SGD(weight_decay=0.1)"}, {"weight_decay": 1.0}, "sets its own"),
        ({"optimizer": "Rprop"}, {"weight_decay": 5.0}, "--weight_decay 5.0 .*: Rprop has none"),
        ({"scheduler": "OneCycleLR(max_lr=0.5)"}, {"lr": 0.1}, "sets all rates itself"),
        ({"scheduler": "OneCycleLR(max_lr=0.5)"}, {"head_lr": 0.1}, "--head_lr .* all rates"),
        ({"scheduler": "CyclicLR(base_lr=0.1, max_lr=0.5)"}, {"lr": 0.1}, "all rates itself"),
        ({"optimizer": "LBFGS"}, {"grad_clip": 2.0}, "--grad_clip 2.0 .* LBFGS .*not clipped"),
        ({"optimizer": "SGD(clip_grad_max_norm=1)"}, {"grad_clip": 2.0}, "clips by its own"),
        ({"optimizer": "SGD(clip_grad_norm_type=1)"}, {}, "no effect without clip_grad_max_norm"),
        ({"scheduler": "OneCycleLR(max_lr=0.5)"}, {"layer_decay": 0.9}, "--layer_d.* all rates"),
        ({}, PROBE | {"layer_decay": 0.9}, "--layer_decay 0.9 .* only the head learns"),
        ({}, PROBE | {"lr": 0.1, "head_lr": 1.0}, "--lr 0.1 .* and --head_lr is its rate"),
        (
            {"optimizer": "Muon"},
            PROBE,
            "Muon .* which --freeze backbone leaves .*--optimizer AdamW",
        ),
        ({}, {"swa_anneal_epochs": 7}, "--swa_anneal_epochs 7 .* no --swa_lr"),
        ({}, {"swa_anneal_strategy": "linear"}, "--swa_anneal_strategy .* no --swa_lr"),
    ],
)
def test_a_wrong_call_and_a_flag_without_effect_are_named(calls, given, message):
    calls = {"optimizer": "AdamW", "scheduler": "cosine", **calls}
    with pytest.raises(UserError, match=message):
        check_calls(**calls, swa_lr=None, given=given)


def test_flags_with_an_effect_are_taken():
    given = {"lr": 1.0, "weight_decay": 1.0, "grad_clip": 1.0, "swa_anneal_epochs": 1}
    muon = "Muon(lr=0.1, weight_decay=0.1, clip_grad_max_norm=[1, None])"  # the rest is AdamW's
    check_calls(muon, "CyclicLR(max_lr=1)", swa_lr=0.1, given=given)
    check_calls("SGD(clip_grad_norm_type=None)", "cosine", swa_lr=None, given={})
    check_calls("AdamW", "OneCycleLR(max_lr=1)", swa_lr=None, given={"layer_decay": 1.0})
    for rate in ("lr", "head_lr"):
        check_calls("AdamW", "cosine", swa_lr=None, given=PROBE | {rate: 0.1})


# ------------------------------------------------------------------------------------ command line


def test_list_names_everything_with_its_defaults_and_needs_no_matplotlib():
    command = [sys.executable, "-X", "importtime", SCRIPT, "--list"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "matplotlib" not in done.stderr
    for name in (*OPTIMIZERS, *SCHEDULERS):
        assert f"  {name}(" in done.stdout
    assert "SGD(lr=<run>, momentum=0, dampening=0, weight_decay=<run>" in done.stdout
    assert "CosineAnnealingLR(T_max=<run>, eta_min=0.0)" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--plot --scheduler cosine --lr 0", "--lr: '0' given"),
        ("--plot --epochs 10", "--epochs is for one schedule"),
        ("--plot --scheduler cosine --epochs 2000000", "--epochs 2000000 x"),
        ("", "nothing to do: give --list or --plot"),
        ("--list --lr 0.1", "--lr has no effect without --plot"),
    ],
)
def test_a_wrong_flag_is_answered_before_pytorch_is_imported(flags, message):
    command = [sys.executable, "-X", "importtime", SCRIPT, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert f"error: {message}" in done.stderr and "torch" not in done.stderr


def test_plot_draws_what_a_run_will_use(run, tmp_path):
    path = tmp_path / "new" / "one.png"
    flags = ["--scheduler", "onecycle", "--head-lr", 0.1, "--epochs", 3, "--steps_per_epoch", 10]
    done = run(optim.main, "--plot", *flags, "--output", path)
    assert done.status == 0 and done.err == ""
    assert done.out.startswith("OneCycleLR(max_lr=[0.001, 0.1], total_steps=30")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def drawn(monkeypatch) -> list[dict]:
    """What figures would draw."""
    panels = []
    monkeypatch.setattr(figures, "lr_schedules", panels.extend)
    monkeypatch.setattr(figures, "save", lambda figure, path: None)
    return panels


def test_groups_with_the_same_rates_are_drawn_once(run, drawn):
    flags = ["--scheduler", "cosine", "--head_lr", 0.1, "--no_decay", "--epochs", 4]
    assert run(optim.main, "--plot", *flags).status == 0
    assert list(drawn[0]["rates"]) == ["body", "head"] and drawn[0]["epochs"] == [0, 1, 2, 3, 4]


def test_plot_without_a_schedule_draws_the_gallery(run, drawn):
    assert run(optim.main, "--plot").status == 0
    assert len(drawn) == len(GALLERY) and drawn[0]["title"] == GALLERY[0][0]
    titles = [panel["title"] for panel in drawn]
    assert "CosineAnnealingLR --swa_start 13 --swa_lr 0.0004 --swa_anneal_epochs 3" in titles
    for panel in drawn:
        for rates in panel["rates"].values():
            assert len(panel["epochs"]) == len(rates) + 1


def test_a_bad_text_is_one_line_and_status_2(run, tmp_path):
    done = run(optim.main, "--plot", "--scheduler", "cosine(\n")
    assert_one_error_line(done, "--scheduler: ")
    assert done.out == "" and not list(tmp_path.iterdir())
