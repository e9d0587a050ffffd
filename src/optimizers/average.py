"""Averages of the weights over a run: exponential, or over its last epochs."""

from torch import Tensor, nn
from torch.optim import swa_utils

from common.errors import UserError


class WeightAverage:
    """An average of a model's weights over the run; the model itself where none is asked for.
    Raises UserError if both are asked for.

    Args:
        ema_decay: average = decay * average + (1 - decay) * weights after every batch; 0: none.
        swa_start: the mean of the weights at the ends of the epochs from this one on, counted from
            1 (Izmailov et al., UAI 2018, https://arxiv.org/abs/1803.05407).
    """

    def __init__(
        self, model: nn.Module, *, ema_decay: float | None = None, swa_start: int | None = None
    ) -> None:
        if ema_decay and swa_start is not None:
            raise UserError(
                f"--ema_decay {ema_decay} and --swa_start {swa_start} are two averages: choose one "
                "(--ema_decay 0 turns a recipe's off)"
            )
        self.model, self.ema_decay, self.swa_start = model, ema_decay, swa_start
        self._averaged = None
        if ema_decay:
            self._move = swa_utils.get_ema_multi_avg_fn(ema_decay)
        if ema_decay or swa_start is not None:
            self._averaged = swa_utils.AveragedModel(model)

    @property
    def active(self) -> bool:
        """Whether there is an average yet."""
        return self._averaged is not None and bool(self._averaged.n_averaged > 0)

    @property
    def module(self) -> nn.Module:
        """The network to validate, save as best and export: the model until there is an average."""
        return self._averaged.module if self.active else self.model

    def step_batch(self) -> None:
        """To be called after every step of the optimizer."""
        if self.ema_decay and not self.active:
            self._averaged.update_parameters(self.model)  # the first time a copy
        elif self.ema_decay:
            # As update_parameters does it, which would make Python wait for a GPU.
            self._move([*self._averaged.module.parameters()], [*self.model.parameters()], None)
            self._averaged.n_averaged += 1

    def step_epoch(self, epoch: int) -> None:
        """To be called after every epoch, counted from 1, before validation."""
        if self.swa_start is not None and epoch >= self.swa_start:
            self._averaged.update_parameters(self.model)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, and of how many weights it is; empty where none is asked for."""
        return {} if self._averaged is None else self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a saved average."""
        if self._averaged is not None:
            self._averaged.load_state_dict(state)
