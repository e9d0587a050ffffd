"""What `optim.py --plot` draws: the gallery of all schedules, and a schedule as a panel."""

from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from optimizers.schedule import Schedule

# For runs of about 20 epochs: a call, and the flags that go with it.
GALLERY: list[tuple[str, dict[str, Any]]] = [
    ("ConstantLR(factor=0.5, total_iters=5)", {}),
    ("LinearLR(start_factor=0.1, total_iters=5)", {}),
    ("StepLR(step_size=5, gamma=0.5)", {}),
    ("MultiStepLR(milestones=[10, 15], gamma=0.1)", {}),
    ("ExponentialLR(gamma=0.85)", {}),
    ("LambdaLR(['0.9 ** epoch', '1 - epoch / 20'])", {"head_lr": 5e-4}),
    ("MultiplicativeLR('0.95 if epoch < 12 else 0.7')", {}),
    ("PolynomialLR(power=2)", {}),
    ("CosineAnnealingLR", {"head_lr": 5e-4}),
    ("CosineAnnealingWarmRestarts(T_0=4, T_mult=2)", {}),
    ("ReduceLROnPlateau(factor=0.5, patience=3)", {}),
    ("CyclicLR(mode='triangular2')", {}),
    ("OneCycleLR", {"head_lr": 5e-4}),
    ("OneCycleLR(three_phase=True, anneal_strategy='linear')", {}),
    ("SequentialLR([LinearLR(0.1, total_iters=4), CosineAnnealingLR], milestones=[4])", {}),
    ("ChainedScheduler([LinearLR(0.1, total_iters=4), ExponentialLR(0.9)])", {}),
    ("CosineDecayLR(decay_steps=15, alpha=0.1)", {}),
    ("PolynomialLR(steps=15, end_learning_rate=1e-4)", {}),
    ("PolynomialLR(steps=5, end_learning_rate=1e-4, cycle=True)", {}),
    ("SWALR(swa_lr=2e-4, anneal_epochs=8)", {}),
    ("CosineAnnealingLR", {"swa_start": 13, "swa_lr": 4e-4, "swa_anneal_epochs": 3}),
    ("CosineAnnealingLR", {"warmup_epochs": 3}),
    ("ReduceLROnPlateau(factor=0.3, patience=2)", {"warmup_epochs": 2, "head_lr": 5e-4}),
    ("LambdaLR('1 / sqrt(1 + step / 400)')", {"scheduler_interval": "step"}),
]


def panel(schedule: Schedule, title: str) -> dict[str, Any]:
    """The rates of a whole run, as `analysis.figures.lr_schedules` draws them."""
    epochs, rates = zip(*schedule.rates(), strict=True)
    curves = {}  # groups that differ in weight decay alone share one
    for group, curve in zip(schedule.optimizer.param_groups, zip(*rates, strict=True), strict=True):
        if curve not in curves.values():
            curves[group.get("name", "all parameters")] = curve
    if schedule.call.cls is ReduceLROnPlateau:
        title += " (validation loss never improving)"
    return {"title": title, "epochs": [*epochs, schedule.epochs], "rates": curves}
