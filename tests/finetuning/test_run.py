"""`btx train`: each mode trains what it says; resuming; what is refused; the result is a checkpoint again."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from btx_merge.modeling import BTXForCausalLM
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainingArguments

from btx_merge import InputError, MergeError, MergeRecipe, NonFiniteError, merge
from btx_merge.checkpoints.tensor_files import stored_tensors
from btx_merge.errors import MergeInterrupted
from btx_merge.files.placing import partial_of
from btx_merge.finetuning import trainer
from btx_merge.finetuning.arguments import training_arguments
from btx_merge.finetuning.card import training_section
from btx_merge.finetuning.metrics import Meter
from btx_merge.finetuning.recipe import TrainRecipe
from btx_merge.finetuning.result import check_finite
from btx_merge.finetuning.run import TrainReport, train
from btx_merge.finetuning.session import Run
from btx_merge.finetuning.stopwatch import Stopwatch
from btx_merge.finetuning.work_folder import SUFFIX, held
from btx_merge.texts.references import DomainText
from tests.support import warm
from tests.support.common import (
    Told,
    assert_complete,
    edit_json,
    files_of,
    grow,
    problems_of,
    raw_bytes,
    save_seed,
    tensors_of,
)
from tests.support.warm import BTX

ARGUMENTS = {
    "max_steps": 6,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
}


def recipe(merged: Path, texts: dict[str, str], **changes: Any) -> TrainRecipe:
    data = tuple(DomainText(name, (file,), weight) for (name, file), weight in zip(texts.items(), (1, 3), strict=True))
    arguments = {**ARGUMENTS, **changes.pop("arguments", {})}
    return TrainRecipe(str(merged), data, **{"max_length": 32, "arguments": arguments, **changes})


def losses_of(report: TrainReport) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in report.history if "loss" in entry}


# What is trained, and the result


def changed(before: Path, after: Path) -> set[str]:
    """Names of tensors whose bytes differ; there are the same, of the same dtype and shape."""
    old, new = tensors_of(before), tensors_of(after)
    assert {name: (x.dtype, x.shape) for name, x in old.items()} == {n: (x.dtype, x.shape) for n, x in new.items()}
    return {name for name in old if raw_bytes(old[name]) != raw_bytes(new[name])}


@pytest.mark.usefixtures("painted")
@pytest.mark.parametrize("mode", ["routers", "shared", "all"])
def test_each_mode_trains_what_it_says_and_nothing_else(merged, texts, tmp_path, mode):
    lines: list[str] = []
    report = train(recipe(merged, texts, train=mode), tmp_path / "out", reporter=Told(line=lines.append))
    names = set(tensors_of(merged))
    gates = {name for name in names if name.endswith("mlp.gate.weight")}
    experts = {name for name in names if ".experts." in name}
    assert (len(gates), len(experts)) == (2, 4)
    expected = {"routers": gates, "shared": names - experts, "all": names}[mode]
    assert changed(merged, tmp_path / "out") == expected
    assert_complete(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    total = sum(tensor.numel() for tensor in tensors_of(merged).values())
    count = sum(tensor.numel() for name, tensor in tensors_of(merged).items() if name in expected)
    assert lines[0].startswith(f"trains {mode}: {count:,} of {total:,} parameters")
    assert report.entry["trained_parameters"] == count
    untouched = set(files_of(merged)) - {"README.md", "btx_recipe.yaml"}
    weights = {name for name in untouched if name.endswith(".safetensors")}
    old, new = files_of(merged), files_of(tmp_path / "out")
    assert {name for name in untouched - weights if old[name] != new[name]} == set()


def test_a_bfloat16_model_learns_in_float32_and_stays_bfloat16(family, texts, tmp_path):
    """Steps of 1e-4 are lost in bfloat16 weights of about 1; here their sum must show."""
    merge(MergeRecipe(str(family.seed), family.experts, dtype="bfloat16"), tmp_path / "merged")
    settings = {"learning_rate": 3e-4, "max_steps": 40, "lr_scheduler_type": "constant", "warmup_steps": 0}
    for name, bf16 in (("out", False), ("mixed", True)):
        changes = {"train": "shared", "arguments": {**settings, "bf16": bf16}}
        train(recipe(tmp_path / "merged", texts, **changes), tmp_path / name)
        names = changed(tmp_path / "merged", tmp_path / name)
        assert "model.norm.weight" in names
        assert not any("experts" in each for each in names)
        old, new = (tensors_of(tmp_path / folder)["model.norm.weight"] for folder in ("merged", name))
        assert (old != new)[old > 0.6].double().mean() > 0.2  # each single step is below half a unit there


def test_an_adapter(merged, texts, tmp_path):
    report = train(recipe(merged, texts, train="lora", lora_target="routers", lora_r=2), tmp_path / "out")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(merged)
    base = AutoModelForCausalLM.from_pretrained(merged)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, tmp_path / "out")(ids).logits
    assert (before - after).abs().max() > 1e-4
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (merged / name).read_bytes()
    assert report.entry["lora_target"] == "routers"
    assert yaml.safe_load((tmp_path / "out/btx_recipe.yaml").read_text())["training"][0]["train"] == "lora"


@pytest.mark.usefixtures("painted")
def test_what_the_result_says_about_itself(merged, texts, tmp_path):
    arguments = {"report_to": "tensorboard", "eval_steps": 3}
    report = train(recipe(merged, texts, train="routers", arguments=arguments), tmp_path / "out")
    written = yaml.safe_load((tmp_path / "out/btx_recipe.yaml").read_text())
    (entry,) = written["training"]
    assert entry == json.loads(json.dumps(report.entry))
    assert (entry["steps"], entry["tokens"], entry["max_length"]) == (6, 6 * 2 * 32, 32)
    assert entry["data"][1] == {"name": "math", "references": ["math.jsonl"], "weight": 3}
    assert entry["arguments"]["learning_rate"] == 1e-2
    assert set(entry["held_out_perplexity"]["after"]) == {"code", "math"}
    card = (tmp_path / "out/README.md").read_text()
    assert "have not been trained" not in card
    assert "| math | `math.jsonl` | 75% |" in card
    assert "](training.png)" in card
    results = ModelCard(card).data.eval_results
    scores = entry["held_out_perplexity"]
    assert [(result.dataset_type, result.metric_name) for result in results] == [
        (name, metric) for name in texts for metric in ("Perplexity", "Perplexity before the finetuning")
    ]
    expected = [scores[when][name] for name in texts for when in ("after", "before")]
    assert [result.metric_value for result in results] == pytest.approx(expected, rel=1e-4)
    assert str(tmp_path) not in card + str(written)
    assert (tmp_path / "out/training.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "out/runs").rglob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in (tmp_path / "out/routing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert torch.tensor([line["load"] for line in lines]).shape == (6, 2, 3)
    assert MergeRecipe.from_yaml(tmp_path / "out/btx_recipe.yaml", seed="x").num_experts_per_tok == 2  # still one

    train(recipe(tmp_path / "out", texts, train="shared"), tmp_path / "again")
    written = yaml.safe_load((tmp_path / "again/btx_recipe.yaml").read_text())
    assert [entry["train"] for entry in written["training"]] == ["routers", "shared"]


def test_it_learns(merged, texts, tmp_path):
    arguments = {"max_steps": 60, "logging_steps": 10}
    report = train(recipe(merged, texts, arguments=arguments), tmp_path / "out")
    before, after = (report.entry["held_out_perplexity"][when] for when in ("before", "after"))
    assert min(before.values()) > 100  # of 128 words
    assert after["code"] < 90
    assert after["math"] < 65  # of 51 words; it has three quarters of the windows


# Interruptions


@pytest.fixture(scope="module")
def whole_run(merged, texts, tmp_path_factory) -> tuple[TrainReport, Path]:
    out = tmp_path_factory.mktemp("whole") / "out"
    arguments = {"max_steps": 10, "logging_steps": 2, "gradient_accumulation_steps": 2}
    return train(recipe(merged, texts, arguments=arguments), out), out


def resumable(merged: Path, texts: dict[str, str], **changes: Any) -> TrainRecipe:
    arguments = {"max_steps": 10, "logging_steps": 2, "gradient_accumulation_steps": 2, "save_steps": 3, **changes}
    return recipe(merged, texts, arguments=arguments)


def test_killed_and_resumed(merged, texts, tmp_path, whole_run):
    """kill -9 between two steps after the checkpoint of step 3, which is between two logging steps."""
    report, out = whole_run
    script = f"""
import os, signal
from btx_merge.finetuning import trainer
from btx_merge.finetuning.recipe import TrainRecipe
from btx_merge.finetuning.run import train
from btx_merge.texts.references import DomainText
from btx_merge.finetuning.metrics import Meter
plain = trainer.BTXTrainer.compute_loss
def deadly(self, *arguments, **options):
    if self.model.training and self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *arguments, **options)
trainer.BTXTrainer.compute_loss = deadly
train({resumable(merged, texts)!r}, {str(tmp_path / "out")!r})
"""
    done = warm.run([sys.executable, "-c", script], level="package")
    assert done.returncode == -signal.SIGKILL, done.stderr
    work = tmp_path / f"out{SUFFIX}"
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-3"]
    shutil.copytree(work / "checkpoint-3", work / "checkpoint-6")  # torn: it ends in the middle of its weights
    (work / "checkpoint-6/complete").unlink()
    os.truncate(work / "checkpoint-6/trained.safetensors", 1000)
    (line,) = problems_of(train, resumable(merged, texts), tmp_path / "out")
    assert "holds a run that was not finished" in line
    assert "--resume continues it" in line
    resumed = train(resumable(merged, texts), tmp_path / "out", resume=True)
    assert losses_of(resumed) == losses_of(report)
    assert changed(out, tmp_path / "out") == set()
    assert resumed.entry["held_out_perplexity"] == report.entry["held_out_perplexity"]


def test_killed_before_the_result_had_its_name(merged, texts, tmp_path, whole_run, monkeypatch):
    report, out = whole_run
    line = failure_of(monkeypatch, resumable(merged, texts), tmp_path / "out")
    assert re.fullmatch(
        r"somewhere: No space left on device\. .* Step 10 is kept in .*-10: .* --resume continues from there\.", line
    )
    assert not (tmp_path / "out").exists()
    resumed = train(resumable(merged, texts), tmp_path / "out", resume=True)
    assert losses_of(resumed) == losses_of(report)
    assert changed(out, tmp_path / "out") == set()


def killed_between_files(call: str) -> None:
    """Train in a process that is killed when two files of the result lie in their place."""
    script = f"""
import os, pathlib, signal
from btx_merge import BranchRecipe, DomainText, TrainRecipe, branch, train
plain, moved = pathlib.Path.rename, []
def deadly(self, place):
    if self.parent.name == "btx_files":
        moved.append(self)
        if len(moved) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, place)
pathlib.Path.rename = deadly
{call}
"""
    done = warm.run([sys.executable, "-c", script], level="package")
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    "train_mode", ["all", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("routers", "lora"))]
)
def test_killed_while_the_result_is_written(merged, texts, tmp_path, train_mode):
    """kill -9 between its files: what is there is no model, and --resume writes what was trained."""
    settings, out = recipe(merged, texts, train=train_mode), tmp_path / "out"
    killed_between_files(f"train({settings!r}, {str(out)!r})")
    assert not out.exists()
    left = partial_of(out)
    assert not list(left.glob("*config.json")), "it would load"
    (checkpoint,) = (tmp_path / f"out{SUFFIX}").glob("checkpoint-*")
    trained = {raw_bytes(tensor) for tensor in load_file(checkpoint / trainer.TRAINED).values()}
    train(settings, out, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert trained <= {raw_bytes(tensor) for tensor in tensors_of(out).values()}
    assert yaml.safe_load((out / "btx_recipe.yaml").read_text())["training"][0]["steps"] == 6
    if train_mode != "lora":
        assert_complete(out)
        assert len(trained) == len(changed(merged, out))


def failure_of(monkeypatch: pytest.MonkeyPatch, settings: TrainRecipe, out: Path) -> str:
    """Trains to the end, where the disk is full."""
    with monkeypatch.context() as patch:
        patch.setattr("btx_merge.finetuning.trainee_btx.copy_files", no_space)
        with pytest.raises(MergeError) as caught:
            train(settings, out)
    return str(caught.value)


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device", "somewhere")


def test_a_full_disk_at_a_checkpoint(merged, texts, tmp_path, whole_run, monkeypatch):
    save, count = trainer.save_file, []

    def second_fails(*arguments: Any) -> None:
        count.append(1)
        return no_space() if len(count) == 2 else save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_file", second_fails)
        with pytest.raises(MergeError, match=r"could not be written .*No space left"):
            train(resumable(merged, texts), tmp_path / "out")
    assert losses_of(train(resumable(merged, texts), tmp_path / "out", resume=True)) == losses_of(whole_run[0])


def test_a_broken_line_loses_nothing(merged, texts, tmp_path, whole_run):
    """Found when it is reached; the steps before are kept, and the repaired text goes on from there."""
    broken = tmp_path / "code.jsonl"
    lines = Path(texts["code"]).read_text().splitlines(keepends=True)
    broken.write_text("".join([*lines[:80], '{"text": \n', *lines[81:]]))
    both = {"code": str(broken), "math": texts["math"]}
    settings = resumable(merged, both, save_steps=100, max_steps=60)
    settings = TrainRecipe(**{**settings.__dict__, "shuffle": 1, "holdout": 0})
    (line,) = problems_of(train, settings, tmp_path / "out")
    assert line.startswith(f"code: {broken}, line 81: no JSON")
    (kept,) = (tmp_path / f"out{SUFFIX}").glob("checkpoint-*/complete")
    step = int(kept.parent.name.partition("-")[2])
    assert step > 3
    broken.write_text("".join(lines))
    report = train(settings, tmp_path / "out", resume=True)
    other = train(settings, tmp_path / "other")
    assert losses_of(report) == losses_of(other)
    assert len(losses_of(report)) == 30


def test_ctrl_c(merged, texts, tmp_path, whole_run):
    """The step in work is finished and saved; one line; exit status 130; --resume goes on."""
    flags = ["--max-steps", "10", "--logging-steps", "2", "--gradient-accumulation-steps", "2", "--max-length", "32"]
    flags += ["--learning-rate", "1e-2", "--per-device-train-batch-size", "2", "--report-to", "none", "--use-cpu"]
    data = [f"--data=code={texts['code']}", f"--data=math={texts['math']}:3"]
    command = [BTX, "train", merged, *data, "-o", tmp_path / "out", *flags]
    with warm.started(command, level="package") as (run, stderr):
        seen = []
        for line in stderr:
            seen.append(line)
            if "2/10" in line:
                os.kill(run.pid, signal.SIGINT)
                break
        rest = stderr.read()
        assert run.wait(60) == 130, "".join(seen) + rest
    (kept,) = tmp_path.glob(f"out{SUFFIX}/checkpoint-*/complete")
    step = kept.parent.name.rpartition("-")[2]
    said = f"error: Interrupted. Step {step} is kept in {kept.parent}: the same command with --resume continues"
    assert said in rest
    assert "Traceback" not in rest
    done = warm.run([*command, "--resume", "--json"], level="package")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["losses"]["last"] == losses_of(whole_run[0])[10]


def test_a_run_is_not_continued_on_another_model(merged, texts, tmp_path, monkeypatch):
    """What it had trained would be put among the weights of another; only the time of a file may change."""
    model = shutil.copytree(merged, tmp_path / "model")
    failure_of(monkeypatch, recipe(model, texts), tmp_path / "out")
    weights = sorted(model.glob("*.safetensors"))[-1]
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\0")
    (line,) = problems_of(train, recipe(model, texts), tmp_path / "out", resume=True)
    assert line.startswith(f"model: {model}: its weights are not those that the run began with")
    weights.write_bytes(content)
    train(recipe(model, texts), tmp_path / "out", resume=True)


def test_a_run_is_continued_only_as_it_began(merged, texts, tmp_path, monkeypatch):
    failure_of(monkeypatch, recipe(merged, texts), tmp_path / "out")
    other = recipe(merged, texts, train="all", arguments={"learning_rate": 1e-3, "logging_steps": 2})
    assert problems_of(train, other, tmp_path / "out", resume=True) == [
        "resume: train: 'all'; expected 'shared', as the run began",
        "resume: learning_rate: 0.001; expected 0.01, as the run began",
    ]
    (line,) = problems_of(train, other, tmp_path / "none", resume=True)
    assert "no finished checkpoint to resume" in line


def test_what_is_kept_when_it_is_interrupted_early(merged, texts, tmp_path, monkeypatch):
    """Ctrl-C while the model is loaded, and in the last step: the same command, or --resume."""

    def pressed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("btx_merge.finetuning.session.Run._load_model", pressed)
        with pytest.raises(MergeInterrupted) as caught:
            train(recipe(merged, texts), tmp_path / "out")
    assert str(caught.value) == (
        "Interrupted. No checkpoint was finished, so nothing is kept: the same command begins anew."
    )
    with monkeypatch.context() as patch:
        patch.setattr("btx_merge.finetuning.trainee_btx.copy_files", pressed)
        with pytest.raises(
            MergeInterrupted, match=r"Step 6 is kept in .*checkpoint-6: the same command with --resume"
        ):
            train(recipe(merged, texts), tmp_path / "out")
    assert train(recipe(merged, texts), tmp_path / "out", resume=True).entry["steps"] == 6


@pytest.mark.parametrize("flags", [[], ["--quiet"]])
def test_progress_on_a_terminal(merged, texts, tmp_path, flags):
    command = [str(BTX), "train", str(merged), f"--data=code={texts['code']}", "-o", str(tmp_path / "out"), *flags]
    command += ["--max-steps=3", "--logging-steps=1", "--max-length=32", "--report-to=none"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    done = warm.run_on_terminal(command, env=environment, level="package")
    shown = done.stderr
    assert done.returncode == 0, shown
    assert ("training" in shown and "3/3" in shown and "0:00:" in shown) == (not flags), shown
    assert ("balancing" in shown) == (not flags)


# Refusals


def test_all_problems_come_before_anything_is_written(merged, texts, tmp_path, family):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("mine")
    data = (DomainText("code", (str(tmp_path / "empty.jsonl"),)), DomainText("math", ("none.jsonl",)))
    found = problems_of(train, TrainRecipe(str(family.seed), data, arguments=ARGUMENTS), tmp_path / "full")
    assert [line.split(":")[0] for line in found] == ["code", "math", "output", "model"]
    assert "'llama', a dense Llama; expected 'btx'" in found[-1]
    assert files_of(tmp_path) == {"empty.jsonl": b"", "full/precious": b"mine"}


def test_windows_beyond_the_positions(merged, texts, tmp_path):
    done = btx_train(
        merged, f"--data=code={texts['code']}", "-o", tmp_path / "out", "--max-steps", "1", "--max-length", "129"
    )
    assert done.returncode == 2
    assert "error: recipe: max_length: 129; expected at most 128, the model's positions" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_values_that_cannot_be_meant():
    found = problems_of(TrainRecipe, "", (), "experts", holdout=0.7, router_grad="full", lora_r=0)
    assert [line.split(": ")[1] for line in found] == ["model", "train", "holdout", "router_grad", "lora_r", "data"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"learning_rat": 1}, ["learning_rat: unknown name. Did you mean learning_rate?"]),
        ({"learning_rate": "fast", "seed": "x"}, ["learning_rate: 'fast'", "seed: 'x'"]),
        ({"num_train_epochs": 2}, ["num_train_epochs: cannot be chosen. Give --max-steps"]),
        ({"max_steps": 0}, ["max_steps: 0; expected at least 1"]),
        ({"max_steps": None}, ["max_steps: missing"]),
        ({"lr_scheduler_type": "sine"}, ["lr_scheduler_type: 'sine'"]),
    ],
)
def test_arguments_of_the_trainer_are_checked(merged, texts, tmp_path, arguments, said):
    found = problems_of(train, recipe(merged, texts, arguments=arguments), tmp_path / "out")
    assert len(found) == len(said)
    assert all(line.startswith(f"command: {text}") for line, text in zip(found, said, strict=True)), found
    assert list(tmp_path.iterdir()) == []


def test_a_domain_without_text(merged, texts, tmp_path):
    (tmp_path / "blank.txt").write_text("  \n\n")
    (line,) = problems_of(train, recipe(merged, {**texts, "math": str(tmp_path / "blank.txt")}), tmp_path / "out")
    assert line.startswith("math: text: not a single token")


def test_a_run_without_a_checkpoint_is_begun_anew(merged, texts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_file", no_space)
        with pytest.raises(MergeError, match="could not be written"):
            train(recipe(merged, texts), tmp_path / "out")
    assert (tmp_path / f"out{SUFFIX}/run.json").exists()
    train(recipe(merged, texts), tmp_path / "out")
    foreign = tmp_path / f"foreign{SUFFIX}"
    foreign.mkdir()
    (foreign / "precious").write_text("mine")
    (line,) = problems_of(train, recipe(merged, texts), tmp_path / "foreign")
    assert "holds files, but no unfinished run" in line


def test_a_disk_that_is_too_small_is_refused_at_once(merged, texts, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    (line,) = problems_of(train, recipe(merged, texts), tmp_path / "out")
    assert "1.00 KB free; expected " in line
    assert list(tmp_path.iterdir()) == []


def test_packages_that_are_missing_are_named_first(merged, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("btx_merge.texts.readers.is_installed", lambda package: False)
    found = problems_of(train, recipe(merged, texts, arguments={"report_to": None}), tmp_path / "out")
    assert [line.split(":")[1].strip() for line in found] == ["accelerate", "matplotlib"]
    assert all("pip install '.[train]'" in line for line in found)


def test_places_to_report_to_that_are_not_there_are_named_first(merged, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    arguments = {"report_to": ["wandb", "wandbb"]}
    missing, unknown = problems_of(train, recipe(merged, texts, arguments=arguments), tmp_path / "out")
    assert missing == "command: report_to: wandb is not installed. Install it, or say none."
    assert unknown.startswith("command: report_to: 'wandbb'; expected none, or one of ")
    assert list(tmp_path.iterdir()) == []
    both = training_arguments({"max_steps": 1, "report_to": ["tensorboard", "tensorboard"]}, str(tmp_path))
    assert both.report_to == ["tensorboard", "tensorboard"]


def test_numbers_that_transformers_would_stumble_over_later_are_named_first(merged, texts, tmp_path):
    arguments = {"per_device_train_batch_size": 0, "seed": -1}
    assert problems_of(train, recipe(merged, texts, arguments=arguments), tmp_path / "out") == [
        "command: per_device_train_batch_size: 0; expected at least 1",
        "command: seed: -1; expected at least 0",
    ]
    assert list(tmp_path.iterdir()) == []


def test_lora_is_not_sharded(merged, texts):
    (line,) = problems_of(recipe, merged, texts, train="lora", fsdp_size=2)
    assert "lora on sharded parameters" in line


def test_sharding_asks_for_ranks(merged, texts, tmp_path):
    assert problems_of(train, recipe(merged, texts, fsdp_size=2), tmp_path / "out") == [
        "recipe: fsdp_size: 2 on 1 ranks; expected the number of ranks. "
        "Start it by `torchrun --nproc-per-node 2 -m btx_merge train ...`."
    ]


def test_experts_are_spread_over_some_of_the_ranks(merged, texts, tmp_path):
    """transformers wants fsdp_size to be a multiple of ep_size; ranks that hold different numbers of experts fail."""
    for sizes in ({"ep_size": 2}, {"ep_size": 4, "fsdp_size": 2}, {"ep_size": 2, "fsdp_size": 3}):
        (line,) = problems_of(recipe, merged, texts, **sizes)
        assert "expected a divisor of fsdp_size. Give --fsdp-size" in line
    (line,) = problems_of(train, recipe(merged, texts, ep_size=2, fsdp_size=2), tmp_path / "out")
    assert line.startswith("recipe: ep_size: 2 for 3 experts; expected as many experts on each rank")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_ranks_that_cannot_meet(merged, texts, tmp_path, monkeypatch, name):
    """Each would train alone, and all write to one folder."""
    monkeypatch.setenv(name, "2")
    (line,) = problems_of(train, recipe(merged, texts), tmp_path / "out")
    assert line.startswith(
        f"command: {name}: 2, but MASTER_ADDR is not set. Start them by `torchrun --nproc-per-node 2"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("variables", "said"), [({}, "Start it by `torchrun"), ({"LOCAL_RANK": "0"}, "--use-cpu")])
def test_ranks_that_do_not_train_together(merged, texts, tmp_path, monkeypatch, variables, said):
    """As with MPI on GPUs, and with torchrun on a device that accelerate has no ranks on."""
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.state.PartialState._prepare_backend", lambda *_: (None, "NO"))
    (line,) = problems_of(train, recipe(merged, texts), tmp_path / "out")
    assert line.startswith("command: WORLD_SIZE: 2, but this process trains with 1 on cpu")
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_gpus_in_one_process(merged, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 4)
    (line,) = problems_of(train, recipe(merged, texts), tmp_path / "out")
    assert line.startswith(
        "command: GPUs: 4 in one process; expected a process for each. Start it by `torchrun --nproc"
    )
    assert list(tmp_path.iterdir()) == []


def test_two_runs_for_one_output(merged, texts, tmp_path):
    """The second neither clears the folder nor is told to remove it."""
    work = tmp_path / f"out{SUFFIX}"
    (work / "checkpoint-3").mkdir(parents=True)
    for name in ("run.json", "checkpoint-3/complete"):
        (work / name).write_text("{}")
    with held(work, "train"):
        for resume in (False, True):
            (line,) = problems_of(train, recipe(merged, texts), tmp_path / "out", resume=resume)
            assert line.startswith(f"output: {work}: another run of btx train works there now. Wait for it")
        with pytest.raises(InputError, match="another run"), held(work, "train"):
            pass
    (line,) = problems_of(train, recipe(merged, texts), tmp_path / "out")
    assert "holds a run that was not finished" in line


def test_a_tied_model_that_also_stores_its_head(texts, tmp_path):
    """transformers does not tie a stored head that differs from the embedding: once that is trained, they differ."""
    seed = save_seed(tmp_path / "seed", tie_word_embeddings=True)
    merge(MergeRecipe(str(seed), {"code": str(grow(seed, tmp_path / "code"))}), tmp_path / "merged")
    (file,) = (tmp_path / "merged").glob("*.safetensors")
    tensors = tensors_of(tmp_path / "merged")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    (line,) = problems_of(train, recipe(tmp_path / "merged", texts), tmp_path / "out")
    assert line.startswith("model: tensor lm_head.weight: unexpected")
    assert not (tmp_path / f"out{SUFFIX}").exists()


def test_an_adapter_cannot_hold_a_selection_bias(merged, texts, tmp_path):
    copy = shutil.copytree(merged, tmp_path / "merged")
    model = BTXForCausalLM.from_pretrained(merged, router_selection_bias=True)
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(copy)
    (line,) = problems_of(train, recipe(copy, texts, train="lora"), tmp_path / "out")
    assert line.startswith("model: config.json: router_selection_bias: true: training moves the bias, and an adapter")
    assert not (tmp_path / f"out{SUFFIX}").exists()


# What is measured


def test_measurements_against_the_model_itself(merged, texts, tmp_path):
    """The first logged step, recomputed from the same rows and the model before training; 1e-4 relative."""
    from transformers import AutoTokenizer

    from btx_merge.finetuning.data import DomainStream, MixedWindows, collate

    settings = recipe(merged, texts, arguments={"max_steps": 1, "learning_rate": 1e-9})
    report = train(settings, tmp_path / "out")
    logged = next(entry for entry in report.history if "loss" in entry)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    streams = [DomainStream(text, tokenizer, 32, settings.holdout) for text in settings.data]
    rows = iter(MixedWindows(streams, settings.shuffle, 0))
    batch = collate([next(rows), next(rows)])
    model = AutoModelForCausalLM.from_pretrained(merged)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.routing.register_forward_hook(lambda _, __, out: chosen.append(out[2]))
    domains = batch.pop("domain").tolist()
    with torch.no_grad():
        out = model(**batch, use_cache=False, output_router_logits=True)
    load = torch.stack([torch.bincount(layer.flatten(), minlength=3) / layer.numel() for layer in chosen])
    for number, name in enumerate(("seed", "code", "math")):
        assert logged[f"load/{name}"] == pytest.approx(load[:, number].mean().item(), rel=1e-4)
    for layer in range(2):
        worst = (3 * load[layer] - 1).abs().max().item()
        assert logged[f"load_deviation/layer_{layer}"] == pytest.approx(worst, rel=1e-4)
    probabilities = [logits.softmax(-1) for logits in out.router_logits]
    entropy = sum(-(p * p.log()).sum(-1).mean() for p in probabilities) / 2
    assert logged["router_entropy"] == pytest.approx(entropy.item(), rel=1e-4)
    assert logged["aux_loss"] == pytest.approx(out.aux_loss.item(), rel=1e-4)
    assert logged["loss"] == pytest.approx(out.loss.item() + 0.01 * out.aux_loss.item(), rel=1e-4)
    sums: dict[int, list[torch.Tensor]] = {}
    for logits, labels, domain in zip(out.logits, batch["labels"], domains, strict=True):
        losses = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none", ignore_index=-100)
        sums.setdefault(domain, []).append(losses[labels[1:] != -100])
    for domain, losses in sums.items():
        expected = torch.cat(losses).mean().exp().item()
        assert logged[f"perplexity/{('code', 'math')[domain]}"] == pytest.approx(expected, rel=1e-4)


def test_a_dead_expert_is_named(merged, texts, tmp_path):
    copy = shutil.copytree(merged, tmp_path / "merged")
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("layers.1.mlp.gate.weight"):
                tensors[name][2] = 0
                tensors[name][:2] = torch.randn(1, 64) * torch.tensor([[1.0], [-1.0]])  # one of them is above 0
        save_file(tensors, file, {"format": "pt"})
    warnings: list[str] = []
    changes = {"arguments": {"learning_rate": 1e-9}, "router_aux_loss_coef": 0.0}
    config = json.loads((copy / "config.json").read_text())
    assert config["num_experts_per_tok"] == 2
    edit_json(copy / "config.json", num_experts_per_tok=1)
    report = train(
        recipe(copy, texts, train="routers", **changes), tmp_path / "out", reporter=Told(warn=warnings.append)
    )
    assert warnings == ["step 1, layer 1: the expert math is dead: 0.00% of the choices, ideal 33%"]
    assert [entry["dead_experts"] for entry in report.history if "loss" in entry] == [1] * 6
    assert "aux_loss" not in report.history[1]


def test_sample_top_1_is_annealed_over_the_run(merged, texts, tmp_path, monkeypatch):
    copy = shutil.copytree(merged, tmp_path / "merged")
    edit_json(copy / "config.json", router_type="sample_top_1")
    seen, plain = [], BTXForCausalLM.set_router_temperature
    monkeypatch.setattr(
        BTXForCausalLM, "set_router_temperature", lambda self, value: (seen.append(value), plain(self, value))[1]
    )
    train(recipe(copy, texts, train="routers"), tmp_path / "out")
    assert seen == pytest.approx([max(0.5, math.exp(-2 * step / 6)) for step in range(6)])


def test_a_selection_bias_is_moved_and_kept(merged, texts, tmp_path):
    model = BTXForCausalLM.from_pretrained(merged, router_selection_bias=True)
    model.save_pretrained(tmp_path / "merged")
    shutil.copy(merged / "tokenizer.json", tmp_path / "merged")
    shutil.copy(merged / "tokenizer_config.json", tmp_path / "merged")
    report = train(recipe(tmp_path / "merged", texts, train="routers", router_grad="dense"), tmp_path / "out")
    moved = {name for name in changed(tmp_path / "merged", tmp_path / "out") if "bias" in name}
    assert moved == {f"model.layers.{layer}.mlp.routing.e_score_correction_bias" for layer in range(2)}
    assert report.entry["router_grad"] == "dense"


def test_routers_are_looked_at_only_where_a_step_is_logged(merged, texts, tmp_path, monkeypatch):
    looked, plain = [], Meter.add
    monkeypatch.setattr(Meter, "add", lambda self, *given: (looked.append(self._tokens), plain(self, *given))[1])
    report = train(recipe(merged, texts, arguments={"logging_steps": 3}), tmp_path / "out")
    assert [line["step"] for line in report.history if "loss" in line] == [3, 6]
    assert looked == [64, 64]  # of two rows of 32


# The command


def btx_train(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = warm.run([BTX, "train", *arguments], cwd=cwd, level="package")
    assert "Traceback" not in done.stderr
    return done


def test_a_file_and_flags(merged, texts, tmp_path):
    """Flags win; paths are seen from the file; arguments of the Trainer stand beside our own options."""
    shutil.copytree(merged, tmp_path / "in/llama-btx")
    for name, file in texts.items():
        shutil.copy(file, tmp_path / f"in/{name}.jsonl")
    (tmp_path / "in/train.yaml").write_text(
        "model: llama-btx\ndata:\n  code: code.jsonl\n  math: {text: math.jsonl, weight: 3}\ntrain: routers\n"
        "max_length: 16\nmax_steps: 2\nlogging_steps: 1\nadam_beta2: 0.95\nreport_to: none\nuse_cpu: true\n"
        "lr_scheduler_kwargs: {min_lr_rate: 0.2}\n"
    )
    flags = ("--max-length", "24", "--adam-beta1=0.8", "--adam_epsilon", "1e-7", "-o", tmp_path / "out", "--json")
    done = btx_train("--config", "in/train.yaml", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    entry = json.loads(done.stdout)
    assert (entry["train"], entry["max_length"], entry["steps"]) == ("routers", 24, 2)
    assert [(domain["name"], domain["weight"]) for domain in entry["data"]] == [("code", 1.0), ("math", 3.0)]
    chosen = entry["arguments"]
    assert (chosen["adam_beta1"], chosen["adam_beta2"], chosen["adam_epsilon"]) == (0.8, 0.95, 1e-7)
    assert chosen["lr_scheduler_kwargs"] == {"min_lr_rate": 0.2}
    assert "trains routers: 384 of" in done.stderr


def test_what_the_command_refuses(merged, texts, tmp_path):
    code = f"--data=code={texts['code']}"
    out = tmp_path / "out"
    done = btx_train(merged, code, "-o", out, "--max-step", "3", "--lr", "1", "--trian", "all", "--train", "most")
    assert done.returncode == 2
    # other packages speak too when transformers imports them: torchao, which `make slow` installs
    lines = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "command: max_step: unknown name. Did you mean max_steps?",
        "command: lr: unknown name. Known are those of transformers.TrainingArguments.",
        "command: trian: unknown name. Did you mean train?",
        "command: --train: 'most'; expected one of routers, shared, all, lora",
    ]
    done = btx_train(merged, code, "--data=math", "-o", out, "--max-steps", "3")
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)
    assert "command: --data: math; expected NAME=REFERENCE[:WEIGHT]" in done.stderr
    assert list(tmp_path.iterdir()) == []


# Trained to the end, and not written


def test_too_little_room_for_the_result(merged, texts, tmp_path, monkeypatch):
    settings, out = recipe(merged, texts), tmp_path / "out"

    def full(run: Any, resume: bool) -> None:
        train_of_run(run, resume)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    train_of_run, usage = Run.train, shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", full)
        (line,) = problems_of(train, settings, out)
    assert re.search(
        r"1\.00 KB free; .*Make room\. Step 6 is kept in .*the same command with --resume continues", line
    )
    assert not out.exists()
    monkeypatch.undo()
    train(settings, out, resume=True)
    assert_complete(out)


@pytest.mark.parametrize("train_mode", ["routers", "lora"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_values_that_are_not_finite_are_not_written(merged, texts, tmp_path, monkeypatch, train_mode, value):
    def diverged(run: Any, resume: bool) -> None:
        train_of_run(run, resume)
        parameter = next(tensor for tensor in run.model.parameters() if tensor.requires_grad)
        with torch.no_grad():
            parameter[-1, -1] = value

    train_of_run = Run.train
    monkeypatch.setattr(Run, "train", diverged)
    out = tmp_path / "out"
    with pytest.raises(NonFiniteError) as caught:
        train(recipe(merged, texts, train=train_mode), out)
    name = r"model\.layers\.0\.mlp\.gate\.weight" if train_mode == "routers" else r"base_model\..*\.lora_A\..*weight"
    assert re.match(rf"{name}: training ended with values that are not finite in torch\.float32\. ", str(caught.value))
    kept = tmp_path / f"out{SUFFIX}"
    assert f"kept in {kept}: " in str(caught.value)
    assert (kept / "checkpoint-6" / "complete").exists()
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_values_beyond_the_dtype_of_the_file(tmp_path):
    name = "model.layers.0.mlp.gate.weight"
    save_file({name: torch.zeros(4, 2, dtype=torch.float16)}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    check_finite(stored, {name: torch.full((4, 2), 6e4)}, tmp_path)
    with pytest.raises(NonFiniteError, match=r"gate\.weight: training ended .* not finite in torch\.float16\. "):
        check_finite(stored, {name: torch.tensor([[0.0, 1.0]] * 3 + [[0.0, 7e4]])}, tmp_path)


def test_a_name_of_a_text_does_not_break_the_cards_table():
    entry = {
        "train": "routers",
        "data": [{"name": "code", "references": ["a|b`<i>.jsonl", "c.txt"], "weight": 1.0}],
        "held_out_perplexity": {"before": {}, "after": {"code": 2.5}},
        **{"trained_parameters": 1, "steps": 1, "tokens": 1, "max_length": 1, "arguments": {"learning_rate": 1.0}},
    }
    (row,) = [line for line in training_section("train", entry, []).splitlines() if line.startswith("| code ")]
    assert row == "| code | <code>a&#124;b&#96;&#60;i&#62;.jsonl</code>, `c.txt` | 100% |  | 2.5 |"


def test_the_report_says_what_the_time_went_into(merged, texts, tmp_path):
    report = train(recipe(merged, texts, arguments={"save_steps": 3}), tmp_path / "out")
    assert list(report.parts) == ["start", "loading", "evaluations", "teachers", "steps", "checkpoints", "writing"]
    assert all(seconds > 0 for part, seconds in report.parts.items() if part != "teachers")
    assert report.parts["teachers"] == 0
    assert sum(report.parts.values()) == pytest.approx(report.seconds)
    assert report.to_dict()["parts"] == report.parts


def test_a_part_inside_another_stops_its_clock(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch.part("steps"), watch.part("evaluations"):
        pass
    spent = watch.book()
    assert (spent["start"], spent["steps"], spent["evaluations"]) == (1 + 16, 2 + 8, 4)


def test_the_last_checkpoint_keeps_no_optimizer(merged, texts, tmp_path, monkeypatch):
    """No step follows it: it is there in case that the result cannot be written, and then gives the same result."""
    settings = recipe(merged, texts, arguments={"save_steps": 3})
    train(settings, tmp_path / "undisturbed")

    def refuse(*_: Any) -> None:
        raise OSError("no room")

    with monkeypatch.context() as broken:
        broken.setattr("btx_merge.finetuning.session.figure_of", refuse)
        with pytest.raises(MergeError, match="no room"):
            train(settings, tmp_path / "out")
    work = tmp_path / f"out{SUFFIX}"
    assert (work / "checkpoint-3/optimizer.pt").exists()
    assert (work / "checkpoint-6/trained.safetensors").exists()
    assert not (work / "checkpoint-6/optimizer.pt").exists()
    train(settings, tmp_path / "out", resume=True)
    assert changed(tmp_path / "undisturbed", tmp_path / "out") == set()
