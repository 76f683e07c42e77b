"""One run on one rank: model, mixture, trainer, result."""

from __future__ import annotations

import shutil
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, set_seed
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from btx_merge.checkpoints.dtypes import config_dtype
from btx_merge.errors import InputError, MergeError, MergeInterrupted, Problem
from btx_merge.files.changes import ReadFiles
from btx_merge.files.folder import read_json
from btx_merge.files.scratch import move_in
from btx_merge.finetuning.arguments import DEFAULTS, training_arguments
from btx_merge.finetuning.callbacks import ConsoleLines, StepCount, StopOnSignal
from btx_merge.finetuning.data import DomainStream, MixedWindows, collate, row_of
from btx_merge.finetuning.metrics import HELD_OUT
from btx_merge.finetuning.picture import figure_of
from btx_merge.finetuning.ranks import check_launch, check_ranks
from btx_merge.finetuning.recipe import Recipe, sharded_over
from btx_merge.finetuning.result import check_finite, check_stored, result_staging
from btx_merge.finetuning.stopwatch import Stopwatch
from btx_merge.finetuning.teachers import Teachers
from btx_merge.finetuning.trainee import Trainee
from btx_merge.finetuning.trainer import BTXTrainer, trained_tensors, whole
from btx_merge.finetuning.work_folder import last_checkpoint, tools, what_is_kept
from btx_merge.model.files import PICTURE
from btx_merge.options import Options
from btx_merge.reporting import Reporter, counted
from btx_merge.sources.locate import Located
from btx_merge.sources.tokenizer_files import load_tokenizer
from btx_merge.texts.references import public_record

_MAX_LENGTH = 1024
"""Tokens of a window where the recipe does not say and the model takes so many: what a small GPU can hold."""
_MOST_HELD_OUT = 64
"""Windows of each domain's held-out part that are scored, so that an evaluation takes seconds. 64 of 1,024 tokens
settle a perplexity to about a hundredth."""


class Run:
    """From a recipe to a result. Everything that all ranks must do together is done here, by each of them."""

    def __init__(self, recipe: Recipe, trainee: Trainee, work: Path, reporter: Reporter, watch: Stopwatch):
        check_launch(trainee.verb)
        self.recipe = recipe
        self.trainee = trainee
        self.located = trainee.located
        self.work, self.watch = work, watch
        self.sizes = sharded_over(recipe)
        self.is_adapter = recipe.train == "lora"
        arguments = {**_precision(recipe, self.located), **recipe.arguments}
        self.args: Any = training_arguments(arguments, str(work))  # it meets the other ranks
        self.is_main = self.args.process_index == 0
        self.reporter = reporter if self.is_main else Reporter()
        chosen: dict[str, Any] = self.args.to_dict()  # type: ignore[no-untyped-call]
        self.settings = {name: chosen[name] for name in (*DEFAULTS, "warmup_steps", "eval_steps", *arguments)}
        check_ranks(trainee.verb, self.sizes, self.args)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()

    def train(self, resume: bool) -> None:
        """Train, or go on training.

        Raises:
            InputError: a text cannot be read; the steps before are saved.
            MergeInterrupted: Ctrl-C or SIGTERM; likewise.
        """
        with self.watch.part("loading"):
            self.model = self._load_model()
            self.streams = self._streams()
            self.teachers = self._teachers()
            held_out = self._held_out()
        if held_out:
            self.args.eval_on_start = not resume
            if "eval_strategy" not in self.recipe.arguments:
                self.args.eval_strategy = "steps"
        self.trainer = self._trainer(held_out)
        self._announce()
        stop = StopOnSignal() if threading.current_thread() is threading.main_thread() else None
        if stop:
            self.trainer.add_callback(stop)
        try:
            checkpoint = last_checkpoint(self.work) if resume else None
            with self.watch.part("steps"):
                if checkpoint:
                    self.trainer.continue_from(checkpoint)
                else:
                    self.trainer.train()
        except InputError:
            if self.trainer.state.global_step:
                self.trainer.save_now()
            raise
        finally:
            if stop:
                stop.restore()
        if stop and stop.is_stopped and self.trainer.state.global_step < self.args.max_steps:
            raise MergeInterrupted  # what is kept, `finetuning.run` says
        scored = [entry["step"] for entry in self.history if any(key.startswith(HELD_OUT) for key in entry)]
        if held_out and (not scored or scored[-1] != self.trainer.state.global_step):
            self.trainer.evaluate()

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.trainer.state.log_history

    def finish(self, target: Path, options: Options, read: ReadFiles) -> Mapping[str, Any]:
        """Write the result and give it its name. All ranks gather; one writes.

        Raises:
            InputError: the model has changed since `read`, something has come into the target's place, or the disk has
                too little room.
            NonFiniteError: what was trained is not finite.
            MergeError: the folder cannot get the target's name.
            OSError: the disk refused.
        """
        entry = self._entry()
        trained = {name: whole(tensor) for name, tensor in trained_tensors(self.model).items()}
        if not self.is_main:
            return entry
        check_finite(self.trainee.stored, trained, self.work)
        with result_staging(self.trainee, target, trained, read, self.reporter, self.is_adapter) as staging:
            staging.write(options.workers, what_is_kept(self.work))
            files = staging.scratch()
            if self.is_adapter:
                self.model.save_pretrained(files, save_embedding_layers=False)  # no target; peft would ask the Hub
            self.trainee.write_files(files, entry, self.history)
            figure_of(self.history, self.trainer.meter.experts).savefig(files / PICTURE, dpi=110)
            if (self.work / "runs").is_dir():  # TensorBoard's
                shutil.copytree(self.work / "runs", files / "runs", dirs_exist_ok=True)
            move_in(files, staging.folder)
            staging.finish(options.overwrite, "the same command with --resume")
        return entry

    def _load_model(self) -> Any:
        """Load what is trained in float32, the rest as it is stored if autocast can bring the two together."""
        args = self.args
        settings: dict[str, Any] = {"use_cache": False}
        sharded: dict[str, Any] = {name: size for name, size in self.sizes.items() if size > 1}
        if sharded:
            settings["distributed_config"] = DistributedConfig(**sharded)
        if not sys.stderr.isatty():  # transformers' bars do not ask
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        mixed = (args.bf16 or args.fp16) and not sharded  # FSDP2 wants all of a layer in one dtype
        model = self.trainee.read_model(dtype="auto" if mixed else torch.float32, **settings)
        set_seed(args.seed)  # a LoRA begins with random numbers, and Trainer comes after it
        if self.is_adapter:
            from peft import get_peft_model

            with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for it by its old name
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                adapted = get_peft_model(model, self.trainee.lora(model))
            of = adapted.peft_config["default"]  # peft knows no org/name@revision
            of.base_model_name_or_path = self.located.repo_id or str(self.located.folder.resolve())
            of.revision = self.located.revision
            model = adapted
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self.trainee.is_trained(name))
                if parameter.requires_grad and parameter.dtype != torch.float32:
                    parameter.data = parameter.data.float()
            check_stored(self.trainee, trained_tensors(model))
        return model

    def _streams(self) -> list[DomainStream]:
        config, recipe = self.model.config, self.recipe
        length = recipe.max_length or min(_MAX_LENGTH, config.max_position_embeddings)
        tokenizer = load_tokenizer(self.located.folder)
        if len(tokenizer) > config.vocab_size:
            found = f"{len(tokenizer)} tokens in the tokenizer"
            raise InputError([Problem("model", "tokenizer", found, f"at most {config.vocab_size}, the embedding's")])
        return [DomainStream(text, tokenizer, length, recipe.holdout) for text in recipe.data]

    def _teachers(self) -> Teachers | None:
        """Return the sources that teach, joined to the loss of the model; None where nobody does."""
        args, sources = self.args, self.trainee.teachers
        if not sources:
            return None
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        teachers = Teachers(sources, dtype, args.device, rows * self.streams[0].length)
        teachers.join(self.model.get_base_model() if self.is_adapter else self.model)
        return teachers

    def _held_out(self) -> dict[str, list[dict[str, Any]]]:
        out = {}
        for domain, stream in enumerate(self.streams):
            windows = stream.held_out(_MOST_HELD_OUT)
            if windows:
                out[stream.text.name] = [row_of(window, domain) for window in windows]
            elif self.recipe.holdout:
                self.reporter.warn(f"{stream.text.name}: too little text to hold a part of it out")
        return out

    def _trainer(self, held_out: dict[str, list[dict[str, Any]]]) -> BTXTrainer:
        domains = [stream.text.name for stream in self.streams]
        meter = self.trainee.meter(self.model, domains, self.reporter)
        parts = ["lm_loss", "teacher_loss"] if self.teachers else []
        if getattr(self.model.config, "router_aux_loss_coef", 0):
            parts.append("aux_loss")
        callbacks: list[TrainerCallback] = [ConsoleLines(self.reporter, domains, meter.experts, parts)]
        callbacks += [StepCount(self.reporter), *self.trainee.callbacks()]
        trainer = BTXTrainer(
            meter,
            self.watch,
            held_out,
            self.args,
            self.teachers,
            model=self.model,
            train_dataset=MixedWindows(self.streams, self.recipe.shuffle, self.args.seed),
            data_collator=collate,
            callbacks=callbacks,
        )
        if self.recipe.fsdp_size > 1 and not trainer.is_sharded:
            raise MergeError("The parameters were not sharded, though fsdp_size asked for it.")
        return trainer

    def _announce(self) -> None:
        """Announce what is trained, before the first step."""
        parameters = list(self.model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.trained_parameters = sum(parameter.numel() for parameter in trained)
        total = sum(parameter.numel() for parameter in parameters)
        self.reporter.line(
            f"trains {self.recipe.train}: {self.trained_parameters:,} of {total:,} parameters "
            f"({self.trained_parameters / total:.2%}), {len(trained)} of {len(parameters)} tensors"
        )
        args, length = self.args, self.streams[0].length
        words = {"fsdp_size": ", sharded over", "ep_size": ", experts over"}
        shares = "".join(f"{words[name]} {size}" for name, size in self.sizes.items() if size > 1)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.reporter.line(
            f"on {counted(args.world_size, 'rank')}, {args.device.type}{shares}: "
            f"{counted(rows, 'window')} of {length:,} tokens a step, "
            f"{rows * length:,} tokens"
        )
        if self.teachers:
            names = ", ".join(source.name for source in self.teachers.sources)
            self.reporter.line(f"taught by the sources {names}, of which one is in memory at a time")

    def _entry(self) -> dict[str, Any]:
        """Return what the recipe and the card record. A file stands there by its name alone, without its path."""
        recipe, args = self.recipe, self.args
        length, steps = self.streams[0].length, self.trainer.state.global_step
        rows = steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        losses = [entry["loss"] for entry in self.history if "loss" in entry]
        scores: dict[str, dict[str, float]] = {"before": {}, "after": {}}
        for entry in self.history:
            for key, value in entry.items():
                if key.startswith(HELD_OUT):
                    domain = key.removeprefix(HELD_OUT)
                    scores["after"][domain] = value
                    if entry["step"] == 0:
                        scores["before"][domain] = value
        return {
            "train": recipe.train,
            **({"lora_target": recipe.lora_target, "lora_r": recipe.lora_r} if self.is_adapter else {}),
            "steps": steps,
            "tokens": rows * length,
            "max_length": length,
            "trained_parameters": self.trained_parameters,
            "data": public_record(recipe.data),
            "holdout": recipe.holdout,
            **self.trainee.settings(),
            "arguments": self.settings,
            "world_size": args.world_size,
            "losses": {"first": losses[0], "last": losses[-1]} if losses else {},
            "held_out_perplexity": scores,
            "tools": tools(),
        }


def _precision(recipe: Recipe, located: Located) -> dict[str, bool]:
    """Choose bfloat16 on a GPU for what is stored so, where nothing else was asked for."""
    if {"bf16", "fp16", "use_cpu"} & set(recipe.arguments) or not torch.cuda.is_available():
        return {}
    config = read_json(located.folder / "config.json")
    return {"bf16": True} if config_dtype(config) == "bfloat16" and torch.cuda.is_bf16_supported() else {}
