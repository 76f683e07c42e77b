"""Callbacks around the steps of a finetuning: signals end it, and a bar shows how far it is."""

from __future__ import annotations

import signal
from collections.abc import Collection, Sequence
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from btx_merge.finetuning.metrics import HELD_OUT
from btx_merge.reporting import Reporter


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the step that is in work, with a checkpoint; a second Ctrl-C at once."""

    def __init__(self) -> None:
        self.is_stopped = False
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def _stop(self, *_: Any) -> None:
        if self.is_stopped:
            raise KeyboardInterrupt
        self.is_stopped = True

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop all ranks at the same step, whichever of them got the signal."""
        asked: Any = reduce(torch.tensor(float(self.is_stopped), device=args.device), "sum")
        self.is_stopped = bool(asked)
        if self.is_stopped and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


_PARTS = {"lm_loss": "LM loss", "teacher_loss": "teacher", "aux_loss": "balancing"}


class ConsoleLines(TrainerCallback):
    """One short line for each logging step, under a head that names the columns."""

    def __init__(self, reporter: Reporter, domains: Sequence[str], experts: Sequence[str], parts: Collection[str]):
        """Take the names of the domains, of the experts, and of the parts of the loss that are logged."""
        self.reporter = reporter
        self._columns = {"loss": "loss", **{name: title for name, title in _PARTS.items() if name in parts}}
        self._columns |= {f"perplexity/{name}": f"ppl {name}" for name in domains}
        self._columns |= {f"load/{name}": f"to {name}" for name in experts}
        self._widths = [max(len(title), 9) for title in ("step", *self._columns.values())]
        self._has_head = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report losses, perplexities and loads; all of it goes to wherever `report_to` says."""
        logs: dict[str, Any] = kwargs["logs"]
        for key, value in logs.items():
            if key.startswith(HELD_OUT):
                name = key.removeprefix(HELD_OUT)
                self.reporter.line(f"step {state.global_step}: perplexity of what is held out of {name}: {value:.4g}")
        if "loss" not in logs:
            return
        if not self._has_head:
            self._line("step", *self._columns.values())
            self._has_head = True
        cells = []
        for key in self._columns:
            value = logs.get(key)
            shape = ".0%" if key.startswith("load/") else ".4g"
            cells.append("-" if value is None else format(value, shape))
        self._line(f"{state.global_step}/{state.max_steps}", *cells)

    def _line(self, *cells: str) -> None:
        self.reporter.line("  ".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True)))


class StepCount(TrainerCallback):
    """Tells how many steps of how many are done: when training begins, and after each step."""

    def __init__(self, reporter: Reporter):
        self.reporter = reporter

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the steps that a continued run has done already."""
        self.reporter.step_done(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count one more step."""
        self.reporter.step_done(state.global_step, state.max_steps)
