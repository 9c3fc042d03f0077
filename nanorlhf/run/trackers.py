"""Where metrics are mirrored for people who look at curves: TensorBoard always, Weights & Biases with --track.

metrics.jsonl is the record; nothing here is read back.
"""

import os
from pathlib import Path

from nanorlhf.errors import UserError


class Trackers:
    """Raises UserError at once when one is asked for that cannot be had; touches nothing before `begin`."""

    def __init__(self, track: bool):
        self._wandb = _import_wandb() if track else None
        self._board_class = _import_tensorboard()
        self._board, self._tracked = None, None
        self.first_step = None  # on resume: TensorBoard hides what it has from this step on

    def begin(self, folder: Path, record: dict) -> None:
        """The folder is the run's own now. record: its config.json; a resumed run has the id that it began with."""
        self._folder = folder
        if self._wandb is None:
            return
        about = dict(project="nanorlhf", name=record["config"]["run_name"], config=record["config"])
        try:
            self._tracked = self._wandb.init(id=record["id"], resume="allow", dir=str(folder), **about)
        except self._wandb.errors.Error as error:
            raise _refused(error) from None
        # W&B drops what is logged under a step it has passed, as a resumed run does: so the step is one of the metrics
        self._tracked.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """The metrics of a step, under their names."""
        if self._board is None:
            self._board = self._board_class(str(self._folder / "tb"), purge_step=self.first_step)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._tracked:
            self._tracked.log(values | {"step": step})

    def close(self, failed: bool) -> None:
        """Flushes both. Calling it twice does nothing."""
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._tracked:
            self._tracked.finish(exit_code=int(failed))
            self._tracked = None


def _import_tensorboard():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard is not installed: pip install tensorboard") from error
    return SummaryWriter


def _import_wandb():
    try:
        import wandb
    except ImportError as error:
        raise UserError("--track needs wandb, which is not installed: pip install wandb, or leave it out") from error
    if os.environ.get("WANDB_MODE", "online") == "online":  # not an hour later, when there is something to log
        try:
            wandb.login()  # asks on a terminal
        except wandb.errors.Error as error:
            raise _refused(error) from None
    return wandb


def _refused(error: Exception) -> UserError:
    return UserError(
        f"--track: W&B says {str(error).strip().rstrip('.')!r}: run `wandb login`, or set WANDB_MODE=offline, or leave "
        "it out"
    )
