"""calls.py: what a text becomes, and how every mistake and every hostile text is refused."""

import time

import pytest
from tiny_training import RUN, tiny_vit

from common.errors import UserError
from optim import build_optimizer
from optimizers.schedule import build_scheduler


def optimizer_of(text):
    return build_optimizer(text, tiny_vit(), **RUN)


def schedule_of(text):
    return build_scheduler(text, optimizer_of("AdamW"), epochs=20, steps_per_epoch=100)


RESOLVED = {
    "adamw": "AdamW(lr=0.01, weight_decay=0.01)",
    "Rprop": "Rprop(lr=0.01)",
    "SGD(0.1, 0.9)": "SGD(lr=0.1, weight_decay=0.01, momentum=0.9)",
    "SGD(lr=0.5, weight_decay=0)": "SGD(lr=0.5, weight_decay=0)",
    "Adam(do_bias_correction=False)": "Adam(lr=0.01, weight_decay=0.01, do_bias_correction=False)",
    "lamb(adam_w_mode=1 < 2)": "LAMB(lr=0.01, weight_decay=0.01, adam_w_mode=True)",
    "cosine": "CosineAnnealingLR(T_max=20)",
    "ONECYCLE": "OneCycleLR(max_lr=0.01, total_steps=2000, cycle_momentum=True)",
    "OneCycleLR(epochs=20, steps_per_epoch=101)": "OneCycleLR(max_lr=0.01, cycle_momentum=True, "
    "epochs=20, steps_per_epoch=101)",
    "cyclic": "CyclicLR(base_lr=0.001, max_lr=0.01, step_size_up=200, cycle_momentum=True)",
    "plateau(patience=2)": "ReduceLROnPlateau(patience=2)",
    "steplr(10, .5)": "StepLR(step_size=10, gamma=0.5)",
    "polynomial": "PolynomialLR(total_iters=20)",
    "PolynomialLR(cycle=True)": "PolynomialLR(steps=20, cycle=True)",
    "MultiStepLR([2**3, 15])": "MultiStepLR(milestones=[8, 15])",
    "LambdaLR(lambda epoch: 0.9**epoch)": "LambdaLR(lr_lambda='lambda epoch: 0.9 ** epoch')",
    "SequentialLR([linear(0.1), cosine], milestones=[5])": "SequentialLR(schedulers=["
    "LinearLR(start_factor=0.1), CosineAnnealingLR(T_max=15)], milestones=[5])",
}


@pytest.mark.parametrize("text", RESOLVED)
def test_a_text_is_resolved_and_makes_the_same_again(text):
    build = optimizer_of if "(lr=" in RESOLVED[text] else schedule_of
    first = build(text)
    again = build(first.text)
    assert first.text == again.text == RESOLVED[text]
    assert type(first) is type(again)


OPTIMIZER_MISTAKES = {
    "AdmaW": r"'AdmaW' is not known; expected one of AdamW, Adam",
    "SGD(momentun=0.9)": r"momentun.*SGD\(lr=0.001, momentum=0, dampening=0",
    "SGD(momentum='a')": "momentum='a' given, expected float",
    "SGD(nesterov='yes')": "nesterov='yes' given, expected bool",
    "SGD(nesterov=True)": "SGD.*Nesterov momentum requires a momentum",
    "Adam(betas=0.9)": "betas=0.9 given",
    "Adam(betas=(0.9, 0.99, 0.999))": "betas",
    "Adam(betas=(2, 0.9))": "Invalid beta",
    "Adam(lr=-1)": "Invalid learning rate",
    "LAMB(eps=-1)": "eps=-1 is negative",
    "LAMB(betas=(0.9, 1))": r"not in \[0, 1\)",
    "SGD(lr=1e999)": "not a finite real number",
    "SGD(lr=nan)": "nan is not a value",
    "SGD(lr=inf)": "inf is not a value",
    "SGD(lr=(-1) ** 0.5)": "not a finite real number",
    "SGD(lr=1/0)": "division by zero",
    "SGD(lr=True)": "lr=True given",
    "SGD(lr=StepLR(3))": "'StepLR' is not known",
    "SGD(params=[])": "params",
    "SGD(capturable=True)": "capturable",
    "Muon(ns_steps=1000)": "Muon",
    "LBFGS(line_search_fn='x')": "strong_wolfe",
    "LBFGS(history_size=10**12)": "history_size",
    "LBFGS(max_iter=0)": "max_iter is not at least 1",
    "LBFGS(clip_grad_max_norm=1)": "LBFGS learns from gradients as they are",
    "LBFGS(clip_grad_norm_type=1)": "LBFGS learns from gradients as they are",
    "SparseAdam": "SparseAdam needs sparse gradients",
    "SGD(clip_grad_max_norm=-1)": "not above 0",
    "SGD(clip_grad_max_norm=[1, 2])": "1 parameter groups, but 2 norms",
    "SGD(clip_grad_max_norm=1, clip_grad_norm_type='a')": "clip_grad_norm_type",
    "SGD(*[1])": "is not a value",
    "SGD(**{})": "is not a value",
    "SGD(lr=0.1, lr=0.2)": "gives an argument twice",
    "SGD(lr=1" + " " * 4000 + ")": "4,009 characters given",
    "SGD(lr=" + "(" * 30 + "1" + ")" * 30 + ")": "nested deeper than 20 brackets",
    "": "not a call such as",
    "SGD(": "not a call such as",
    "3": "not a call such as",
    "SGD().step()": "not a call such as",
    "torch.optim.SGD()": "not a call such as",
}
SCHEDULER_MISTAKES = {
    "cosin": r"'cosin' is not known; expected one of Cosine",
    "StepLR": r"StepLR\(\) lacks step_size; StepLR\(step_size, gamma=0.1\)",
    "StepLR(step_size=-5)": "step_size=-5 given",
    "StepLR(step_size=0)": "StepLR",
    "StepLR(step_size=2.5)": "step_size=2.5 given, expected int;",
    "CosineAnnealingLR(T_max=-1)": "T_max=-1 given, expected int of at least 0;",
    "StepLR(2, gamma=-1)": "the learning rate is",
    "MultiStepLR(milestones=3)": "milestones=3 given",
    "MultiStepLR(milestones=['a'])": "milestones",
    "CosineAnnealingLR(T_max=0)": "zero",
    "CosineAnnealingLR(eta_min=nan)": "nan is not a value",
    "OneCycleLR(total_steps=5)": "Tried to step",
    "LambdaLR('epoch.real')": "epoch.real is not a value",
    "LambdaLR('open(1)')": r"open\(1\) is not a value",
    "LambdaLR('1 / (5 - epoch)')": "'1 / \\(5 - epoch\\)' at 5: ",
    "LambdaLR('-epoch')": "the learning rate is",
    "LambdaLR('10 ** (10 ** epoch)')": "not a finite real number",
    "LambdaLR(3)": "lr_lambda=3 given",
    "LambdaLR(['1', '1'])": "lr_lambdas",
    "SequentialLR([cosine, cosine], milestones=[])": "rising milestones",
    "SequentialLR([cosine, cosine, cosine], milestones=[9, 3])": "rising milestones",
    "SequentialLR([cosine, plateau], milestones=[3])": "ReduceLROnPlateau",
    "ChainedScheduler([1, 2])": "schedulers",
    "ChainedScheduler([])": "at least one",
    "CyclicLR(max_lr=[1, 2])": "max_lr",
}


@pytest.mark.parametrize(
    ("build", "text", "message"),
    [(optimizer_of, *item) for item in OPTIMIZER_MISTAKES.items()]
    + [(schedule_of, *item) for item in SCHEDULER_MISTAKES.items()],
)
def test_a_mistake_is_named(build, text, message):
    with pytest.raises(UserError, match=message):
        build(text)


HOSTILE = {
    "code": "__import__('os').system('touch hostile')",
    "code as value": "SGD(lr=__import__('os').getpid())",
    "10 MB of brackets": "(" * 10_000_000,
    "10 MB of name": "A" * 10_000_000,
    "brackets": "[" * 3000,
    "closing first": ")" * 100 + "(" * 100,
    "nested calls": "SequentialLR([" * 1000 + "])" * 1000,
    "a few nested calls": "SequentialLR([" * 200 + "cosine" + "], milestones=[])" * 200,
    "signs": "SGD(lr=" + "-" * 3900 + "1)",
    "sum": "SGD(lr=" + "+".join(["1"] * 1900) + ")",
    "power tower": "SGD(lr=2**10**10)",
    "power tower to the right": "SGD(lr=" + "9**" * 900 + "9)",
    "large product": "SGD(lr=" + "*".join(["9" * 90] * 40) + ")",
    "large number": "SGD(lr=" + "9" * 3900 + ")",
    "large text": "SGD(lr='a' * 10**10)",
    "large list": "MultiStepLR([1] * 10**10)",
    "comprehension": "MultiStepLR([i for i in range(10**10)])",
    "null": "SGD(\0)",
    "walrus": "SGD(lr=(a := 1))",
    "format": "SGD(lr=f'{1:1000000000}')",
    "expression tower": "LambdaLR('9**9**9**9')",
    "expression sum": "LambdaLR('" + "+".join(["epoch"] * 600) + "')",
    "expression nested": "LambdaLR('" + "-" * 3900 + "epoch')",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_refused_at_once(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    for build in (optimizer_of,) if text.startswith("SGD") else (optimizer_of, schedule_of):
        with pytest.raises(UserError) as error:
            build(text)
        assert len(str(error.value)) < 1000
    assert time.perf_counter() - start < 3
    assert not list(tmp_path.iterdir())
