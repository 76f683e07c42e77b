"""`transformers.Trainer` with checkpoints of what is trained alone, and with measurements of the logged steps."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from btx_merge.errors import InputError, MergeError, Problem
from btx_merge.files.placing import remove
from btx_merge.finetuning.data import IGNORED
from btx_merge.finetuning.metrics import HELD_OUT, LOAD_PER_LAYER, DomainLosses
from btx_merge.finetuning.stopwatch import Stopwatch
from btx_merge.finetuning.teachers import STATES, Teachers
from btx_merge.finetuning.work_folder import COMPLETE, what_is_kept
from btx_merge.measuring.losses import perplexity

TRAINED = "trained.safetensors"
SELECTION_BIAS = "e_score_correction_bias"
Row = dict[str, Any]
_RUNNING = ("_tr_loss", "_globalstep_last_logged")
"""Attributes of the Trainer that make up the mean loss of the next log line; its own checkpoints leave them out."""


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a run changes: parameters that have a gradient, and the routers' selection bias where there is one.

    After an evaluation FSDP2 leaves some parameters gathered. They are no `DTensor` then, and a tied head has a name
    of its own; so all are sharded again first.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return trained | {name: tensor for name, tensor in model.named_buffers() if name.endswith(SELECTION_BIAS)}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor in one piece, on the CPU. Where it is sharded, all ranks must ask."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


class BTXTrainer(Trainer):
    """Trainer with a checkpoint of the trained tensors alone, and with measurements at every logging step."""

    model: nn.Module
    optimizer: Any
    lr_scheduler: Any
    is_sharded: bool
    """Whether the model's parameters lie on several ranks."""

    def __init__(
        self,
        meter: DomainLosses,
        watch: Stopwatch,
        held_out: Mapping[str, list[Row]],
        args: Any,
        teachers: Teachers | None,
        **options: Any,
    ):
        # Trainer cannot save the optimizer of a model that was sharded as it was loaded, and refuses; below it is done
        self.is_sharded = any(isinstance(parameter, DTensor) for parameter in options["model"].parameters())
        args.save_only_model = self.is_sharded
        super().__init__(args=args, eval_dataset=dict(held_out), **options)
        args.save_only_model = False
        self.meter, self.watch = meter, watch
        self.teachers = teachers
        self._taught: deque[Any] = deque()
        self.carried_loss = 0.0
        self.held_out = held_out
        self.checkpoints_kept = self.args.save_total_limit
        self.args.save_total_limit = None  # an old one goes when the new one is complete, which Trainer does not know
        self.remove_callback(PrinterCallback)

    def continue_from(self, checkpoint: Path) -> None:
        """Train on from a checkpoint; from that of the last step it only takes what was trained."""
        saved = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if saved.global_step < self.args.max_steps:  # otherwise no step is left, and only the result is to be written
            self.add_callback(_RunningLoss(self, checkpoint))
            self.train(resume_from_checkpoint=str(checkpoint))
        else:
            self._load_from_checkpoint(str(checkpoint))
            self.state = saved

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Take the micro-batches of a step; with teachers those of many steps, for them to look at."""
        if self.teachers is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._taught:
            for _ in range(min(self.teachers.steps_ahead, self.args.max_steps - self.state.global_step)):
                self._taught.append(super().get_batch_samples(epoch_iterator, num_batches, device))
            with self.watch.part("teachers"):
                self.teachers.look_at([batch for batches, _ in self._taught for batch in batches])
        return self._taught.popleft()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the loss as Trainer does, and measure it where the step will be logged."""
        inputs = dict(inputs)
        domains, states = inputs.pop("domain"), inputs.pop(STATES, None)
        step = self.state.global_step + 1
        is_logged = step % self.state.logging_steps == 0 or (self.args.logging_first_step and step == 1)
        is_measured = model.training and is_logged
        taught = nullcontext() if self.teachers is None else self.teachers.teaching(states, domains)
        with self.meter.watching(is_measured), taught:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if is_measured:
            self.meter.add(outputs, inputs["labels"], domains)
            if self.teachers:
                self.meter.add_divergences(self.teachers.last)
        return (loss, outputs) if return_outputs else loss

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *arguments: Any, **options: Any) -> None:
        """Make the loss since the last logging an attribute where it is none (transformers 5.0)."""
        tr_loss += self.carried_loss
        self.carried_loss = 0.0
        self._tr_loss = tr_loss
        super()._maybe_log_save_evaluate(tr_loss, *arguments, **options)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add what was measured; to the history also the load of each layer."""
        load = None
        if "loss" in logs:
            measured, load = self.meter.take(self.state.global_step, self.args.device)
            logs = logs | measured
        super().log(logs, start_time)
        if load is not None:
            last: dict[str, Any] = self.state.log_history[-1]
            last[LOAD_PER_LAYER] = load

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Compute the perplexity of what is held out of each domain, over all its tokens; each rank scores a part."""
        with self.watch.part("evaluations"):
            metrics = self._perplexities()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _perplexities(self) -> dict[str, float]:
        self.model.eval()
        metrics = {}
        for domain, rows in self.held_out.items():
            total = torch.zeros(2, device=self.args.device)  # loss, tokens
            size, ranks = self.args.per_device_eval_batch_size, self.args.world_size
            for begin in range(0, len(rows), size * ranks):
                own = rows[begin + self.args.process_index * size :][:size]
                batch = self._prepare_inputs(self.data_collator(own or rows[:1]))  # sharded, all ranks must call
                batch.pop("domain")
                with self.compute_loss_context_manager():
                    loss = self.model(**batch).loss
                count = float((batch["labels"][:, 1:] != IGNORED).sum()) if own else 0.0
                if count:
                    total += torch.stack([loss.detach().float() * count, torch.tensor(count, device=total.device)])
            total = self.accelerator.reduce(total, "sum")
            metrics[f"{HELD_OUT}{domain}"] = perplexity(float(total[0] / total[1].clamp(min=1)))
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        tensors = {name: whole(tensor) for name, tensor in trained_tensors(self.model).items()}
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / TRAINED)

    def save_now(self) -> None:
        """Save a checkpoint of the last step that was finished."""
        self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.watch.part("checkpoints"):
            self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch's writer has no error of its own
            reason = " ".join(str(error).split())
            kept = what_is_kept(folder)
            raise MergeError(f"{folder}: the checkpoint could not be written ({reason}). {kept}") from error
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        running = {name: float(getattr(self, name)) for name in _RUNNING if hasattr(self, name)}
        (checkpoint / f"running_{self.args.process_index}.json").write_text(json.dumps(running))
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # every rank has written its part
        if self.args.should_save:
            (checkpoint / COMPLETE).touch()
            steps = sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))
            for step in steps[: -self.checkpoints_kept] if self.checkpoints_kept else ():
                remove(folder / f"checkpoint-{step}", self.meter.reporter.note)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.state.global_step >= self.args.max_steps:  # no step follows that would need them
            return
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        os.makedirs(output_dir, exist_ok=True)  # each rank has a part of the optimizer's state
        torch.save(_local(self.optimizer.state_dict()), Path(output_dir) / self._own_optimizer_file)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        saved = torch.load(Path(checkpoint) / self._own_optimizer_file, weights_only=True)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, state in saved["state"].items():
            like = parameters[number]
            for key, value in state.items():
                if isinstance(like, DTensor) and value.ndim:
                    state[key] = DTensor.from_local(
                        value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
                    )
        self.optimizer.load_state_dict(saved)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    @property
    def _own_optimizer_file(self) -> str:
        return f"optimizer_{self.args.process_index}_of_{self.args.world_size}.pt"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / TRAINED)
        own = trained_tensors(self.model)
        if set(saved) != set(own):  # the recipes were compared, so the file itself is another one
            found, expected = f"{len(saved):,} tensors", f"the {len(own):,} that this run trains"
            remedy = "Remove that checkpoint: --resume then continues from the one before."
            raise InputError([Problem("resume", f"{resume_from_checkpoint}/{TRAINED}", found, expected, remedy)])
        with torch.no_grad():
            for name, tensor in own.items():
                value = saved[name]
                if isinstance(tensor, DTensor):
                    value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
                tensor.copy_(value)


def _local(state: Any) -> Any:
    """Put this rank's part in the place of each sharded tensor of an optimizer's state."""
    if isinstance(state, Mapping):
        return {key: _local(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_local(value) for value in state]
    return state.to_local() if isinstance(state, DTensor) else state


class _RunningLoss(TrainerCallback):
    """Gives the trainer back what it has summed up since it last logged; it begins at 0 otherwise."""

    def __init__(self, trainer: BTXTrainer, checkpoint: Path):
        self.trainer = trainer
        self.saved = json.loads((checkpoint / f"running_{trainer.args.process_index}.json").read_text())

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        for name, value in self.saved.items():
            before = getattr(self.trainer, name, None)
            if before is None:  # transformers 5.0 keeps the sum in a variable of its own
                self.trainer.carried_loss = value
            else:
                setattr(self.trainer, name, torch.full_like(before, value) if torch.is_tensor(before) else int(value))
