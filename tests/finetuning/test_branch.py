"""`btx branch`: an expert from a seed, against a plain Trainer; what stays the seed's; what a merge makes of it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner

from btx_merge import BranchRecipe, InputError, MergeRecipe, branch, check, info, merge
from btx_merge.cli.app import app
from btx_merge.errors import MergeInterrupted
from btx_merge.files.placing import partial_of
from btx_merge.finetuning import trainer
from btx_merge.finetuning.data import DomainStream, MixedWindows, collate
from btx_merge.finetuning.work_folder import SUFFIX
from btx_merge.publishing.checks import examine
from btx_merge.sources.source import SEED
from btx_merge.texts.references import DomainText
from tests.finetuning.test_run import ARGUMENTS, changed, killed_between_files, losses_of
from tests.support import warm
from tests.support.common import (
    Told,
    assert_complete,
    edit_json,
    files_of,
    force_expert,
    load_float32,
    logits_of,
    problems_of,
    raw_bytes,
    save_seed,
    tensors_of,
)
from tests.support.warm import BTX


def recipe(seed: Path, texts: dict[str, str], **changes: Any) -> BranchRecipe:
    data = (DomainText("code", (texts["code"],)),)
    arguments = {**ARGUMENTS, **changes.pop("arguments", {})}
    return BranchRecipe(str(seed), **{"data": data, "max_length": 32, "arguments": arguments, **changes})


def is_feed_forward(name: str) -> bool:
    return "_proj.weight" in name and ".mlp." in name


# What is trained, and the result


def test_a_plain_trainer_has_the_same_losses(family, texts, tmp_path):
    """On the same windows, from the same first rows, within 1e-6; and ends with the same weights within 1e-6."""
    settings = recipe(family.seed, texts, holdout=0.0)
    report = branch(settings, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(family.seed)
    windows = MixedWindows([DomainStream(settings.data[0], tokenizer, 32, 0.0)], settings.shuffle, 0)
    rows = [{**row} for row in itertools.islice(windows, 2 * 6)]
    for row in rows:
        row.pop("domain")

    def stacked(part: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        out = collate([{**row, "domain": 0} for row in part])
        return {name: tensor for name, tensor in out.items() if name != "domain"}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    model = LlamaForCausalLM.from_pretrained(family.seed)
    plain = {**ARGUMENTS, "weight_decay": 0.1, "lr_scheduler_type": "cosine_with_min_lr", "save_strategy": "no"}
    plain |= {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "remove_unused_columns": False, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path / "plain"), **plain)
    theirs = InOrder(model, arguments, train_dataset=rows, data_collator=stacked)
    theirs.train()
    expected = {entry["step"]: entry["loss"] for entry in theirs.state.log_history if "loss" in entry}
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    assert losses_of(report) == pytest.approx(expected, abs=1e-6)
    ours = tensors_of(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert (ours[name] - tensor).abs().max() <= 1e-6, name


@pytest.mark.usefixtures("painted")
@pytest.mark.parametrize("mode", ["all", "ff"])
def test_what_is_trained_and_nothing_else(family, texts, tmp_path, mode):
    lines: list[str] = []
    report = branch(recipe(family.seed, texts, train=mode), tmp_path / "out", reporter=Told(line=lines.append))
    names = set(tensors_of(family.seed))
    blocks = set(filter(is_feed_forward, names))
    assert len(blocks) == 2 * 3
    assert changed(family.seed, tmp_path / "out") == (names if mode == "all" else blocks)
    assert_complete(tmp_path / "out")
    trained = names if mode == "all" else blocks
    count = sum(tensors_of(family.seed)[name].numel() for name in trained)
    assert report.entry["trained_parameters"] == count
    assert lines[0].startswith(f"trains {mode}: {count:,} of ")
    assert lines[3].split() == ["step", "loss", "ppl", "code"]  # no routers, so no balance and no loads
    before, after = files_of(family.seed), files_of(tmp_path / "out")
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert kept <= set(before)
    assert all(before[name] == after[name] for name in kept)
    assert set(after) - set(before) == {"README.md", "btx_branch.yaml", "training.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_documents_in_a_window_do_not_see_each_other(family, texts, tmp_path):
    """The held-out perplexity is that of each document read alone, in windows that hold several; 1e-5 relative."""
    report = branch(recipe(family.seed, texts, arguments={"max_steps": 1}, max_length=64), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(family.seed)
    windows = DomainStream(DomainText("code", (texts["code"],)), tokenizer, 64, 0.02).held_out(64)
    model, total, tokens = load_float32(family.seed), 0.0, 0
    documents = 0
    for ids, positions in windows:
        starts = [place for place, position in enumerate(positions) if position == 0]
        for start, stop in itertools.pairwise([*starts, len(ids)]):
            documents += 1
            one = torch.tensor([ids[start:stop]])
            with torch.no_grad():
                logits = model(one).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, one[0, 1:], reduction="sum").item()
            tokens += stop - start - 1
    assert documents > len(windows)
    expected = torch.tensor(total / tokens).exp().item()
    assert report.entry["held_out_perplexity"]["before"]["code"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["all", "ff"])
def test_a_tied_seed_in_bfloat16(texts, tmp_path, mode):
    """As Llama 3.2 1B and SmolLM2 are; this one stores its head once more. It learns in float32."""
    seed = save_seed(tmp_path / "seed", dtype=torch.bfloat16, tie_word_embeddings=True)
    branch(recipe(seed, texts, train=mode, arguments={"learning_rate": 1e-3}), tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    moved = changed(seed, tmp_path / "out")
    assert ("model.embed_tokens.weight" in moved) == (mode == "all")
    assert set(filter(is_feed_forward, tensors_of(seed))) <= moved
    assert_complete(tmp_path / "out")
    assert (logits_of(load_float32(seed)) - logits_of(load_float32(tmp_path / "out"))).abs().max() > 1e-3


def test_a_seed_of_torch_files_with_a_head_that_is_tied(texts, tmp_path):
    """Written as safetensors, without the head, which is the embedding once more."""
    seed = save_seed(tmp_path / "seed", tie_word_embeddings=True)
    tensors = tensors_of(seed)
    torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, seed / "pytorch_model.bin")
    (seed / "model.safetensors").unlink()
    branch(recipe(seed, texts, train="ff"), tmp_path / "out")
    ours = tensors_of(tmp_path / "out")
    assert set(ours) == set(tensors)
    same = {name for name in tensors if raw_bytes(ours[name]) == raw_bytes(tensors[name])}
    assert same == {name for name in tensors if not is_feed_forward(name)}
    assert not (tmp_path / "out/pytorch_model.bin").exists()


def test_what_the_result_says_about_itself(family, texts, tmp_path):
    cached = tmp_path / "models--meta-llama--Llama-3.2-1B/snapshots" / ("0f" * 20)
    shutil.copytree(family.seed, cached)
    (cached / "README.md").write_text("---\nlicense: llama3.2\nlanguage: [en]\n---\n# Llama\n")
    (cached / "additional_chat_templates").mkdir()
    (cached / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    (cached / "chat_template.jinja").write_text("{{ messages }}")
    report = branch(recipe(cached, texts, arguments={"report_to": "tensorboard"}), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model == ["meta-llama/Llama-3.2-1B"]
    assert (card.data.base_model_relation, card.data.license, card.data.language) == ("finetune", "llama3.2", ["en"])
    assert f"at revision {'0f' * 20}" in card.text
    assert f"btx merge --seed meta-llama/Llama-3.2-1B@{'0f' * 20} --expert code=. " in card.text
    assert "| code | `code.jsonl` | 100% |" in card.text
    scores = report.entry["held_out_perplexity"]
    assert [result.metric_value for result in card.data.eval_results] == pytest.approx(
        [scores["after"]["code"], scores["before"]["code"]], rel=1e-4
    )
    record = yaml.safe_load((tmp_path / "out/btx_branch.yaml").read_text())
    assert record == {"seed": f"meta-llama/Llama-3.2-1B@{'0f' * 20}", **json.loads(json.dumps(report.entry))}
    assert (record["train"], record["steps"], record["tokens"]) == ("all", 6, 6 * 2 * 32)
    assert str(tmp_path) not in card.content + str(record)
    assert (tmp_path / "out/additional_chat_templates/tools.jinja").exists()
    assert (tmp_path / "out/chat_template.jinja").exists()
    assert list((tmp_path / "out/runs").rglob("events.out.tfevents.*"))


# The merge


def test_branches_of_feed_forward_blocks_merge_without_loss(texts, tmp_path):
    """All that is averaged is the seed's to the byte, before and after, and an expert answers as its branch did.

    In bfloat16: of equal numbers in float32, a mean may differ in the last bit.
    """
    seed, experts = save_seed(tmp_path / "seed", dtype=torch.bfloat16), {}
    for name in ("code", "math"):
        settings = recipe(seed, texts, data={name: texts[name]}, train="ff", arguments={"learning_rate": 1e-2})
        branch(settings, tmp_path / name)
        experts[name] = str(tmp_path / name)
    shared = ("embeddings", "norms", "attention", "head")
    checked = check(MergeRecipe(str(seed), experts))
    assert {name: set(groups) for name, groups in (checked.unchanged or {}).items()} == {
        key: set(shared) for key in experts
    }
    assert checked.is_lossless
    merge(MergeRecipe(str(seed), experts), tmp_path / "merged")
    before, merged = tensors_of(seed), tensors_of(tmp_path / "merged")
    for name, tensor in before.items():
        if not is_feed_forward(name):
            assert raw_bytes(merged[name]) == raw_bytes(tensor), name
    model = load_float32(tmp_path / "merged")
    force_expert(model, 2)
    assert (logits_of(model) - logits_of(load_float32(tmp_path / "math"))).abs().max() < 1e-5


@pytest.mark.parametrize("target", ["ff", "all"])
def test_an_adapter_merges(family, texts, tmp_path, target):
    """Over the seed in peft it answers as the expert does in which the merge put it. 1e-5 of logits of about 1."""
    settings = recipe(family.seed, texts, train="lora", lora_target=target, lora_r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # peft's, which a user can do nothing about
        report = branch(settings, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")  # of the adapter's own folder
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(family.seed).get_vocab()
    names = {name.split(".")[-3] for name in load_file(tmp_path / "out/adapter_model.safetensors")}
    blocks = {"gate_proj", "up_proj", "down_proj"}
    assert names == blocks | ({"q_proj", "k_proj", "v_proj", "o_proj"} if target == "all" else set())
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(family.seed)
    assert report.entry["lora_target"] == target
    merge(MergeRecipe(str(family.seed), {"code": str(tmp_path / "out")}), tmp_path / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(family.seed), tmp_path / "out")
    assert (logits_of(adapted) - logits_of(load_float32(family.seed))).abs().max() > 1e-3
    whole = adapted.merge_and_unload().state_dict()
    merged = tensors_of(tmp_path / "merged")
    down = "model.layers.1.mlp.down_proj.weight"
    assert (merged["model.layers.1.mlp.experts.down_proj"][1] - whole[down]).abs().max() < 1e-5
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "base_model" not in card.data.to_dict()  # a folder, by a name that means nothing elsewhere
    assert "a local folder" in card.text
    assert "## Training" in card.text
    assert "trust_remote_code" not in card.text


# Interruptions


def resumable(seed: Path, texts: dict[str, str], **changes: Any) -> BranchRecipe:
    arguments = {"max_steps": 10, "logging_steps": 2, "gradient_accumulation_steps": 2, "save_steps": 3, **changes}
    return recipe(seed, texts, arguments=arguments)


def test_stopped_and_resumed(family, texts, tmp_path, monkeypatch):
    """Ctrl-C in the fifth step: the run ends behind it, and --resume ends with the same losses and the same bytes."""
    whole = branch(resumable(family.seed, texts), tmp_path / "whole")
    plain, presses = trainer.BTXTrainer.compute_loss, []

    def pressed(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.model.training and self.state.global_step == 4 and not presses:
            presses.append(signal.raise_signal(signal.SIGINT))
        return plain(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.BTXTrainer, "compute_loss", pressed)
        with pytest.raises(MergeInterrupted, match=r"Step 5 is kept in .*checkpoint-5: the same command with --res"):
            branch(resumable(family.seed, texts), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    resumed = branch(resumable(family.seed, texts), tmp_path / "out", resume=True)
    assert losses_of(resumed) == losses_of(whole)
    assert changed(tmp_path / "whole", tmp_path / "out") == set()


def test_killed_while_the_result_is_written(family, texts, tmp_path):
    """kill -9 between its files: what is there is no model, and --resume writes what was trained."""
    settings, out = recipe(family.seed, texts), tmp_path / "out"
    expected = branch(settings, tmp_path / "expected")
    killed_between_files(f"branch({settings!r}, {str(out)!r})")
    assert not out.exists()
    assert not list(partial_of(out).glob("*config.json")), "it would load"
    assert (tmp_path / f"out{SUFFIX}").exists()
    report = branch(settings, out, resume=True)
    assert losses_of(report) == losses_of(expected)
    assert changed(tmp_path / "expected", out) == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


# Refusals


def test_all_problems_come_before_anything_is_written(merged, family, texts, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("mine")
    settings = recipe(tmp_path / "none", {"code": "none.jsonl"})
    found = problems_of(branch, settings, tmp_path / "full")
    assert [line.split(":")[0] for line in found] == ["code", "seed", "output"]
    (line,) = problems_of(branch, recipe(merged, texts), tmp_path / "out")
    assert "This is a merged model already" in line
    assert files_of(tmp_path) == {"full/precious": b"mine"}


def test_windows_beyond_the_positions(family, texts, tmp_path):
    (line,) = problems_of(branch, recipe(family.seed, texts, max_length=129), tmp_path / "out")
    assert line == "recipe: max_length: 129; expected at most 128, the model's positions"
    assert list(tmp_path.iterdir()) == []


def test_a_seed_that_no_merge_would_take(family, texts, tmp_path):
    seed = shutil.copytree(family.seed, tmp_path / "seed")
    (seed / "tokenizer.json").unlink()
    edit_json(seed / "config.json", num_hidden_layers=1)
    edit_json(seed / "generation_config.json", early_stopping="maybe")
    found = problems_of(branch, recipe(seed, texts), tmp_path / "out")
    assert all(line.startswith(f"{SEED}: ") for line in found)
    assert "unexpected" in found[0]
    assert "generation_config.json: early_stopping: 'maybe'" in found[-2]
    assert "no tokenizer" in found[-1]
    assert not (tmp_path / f"out{SUFFIX}").exists()


def test_a_config_that_transformers_refuses(family, texts, tmp_path):
    seed = shutil.copytree(family.seed, tmp_path / "seed")
    edit_json(seed / "config.json", id2label=5)
    (line,) = problems_of(branch, recipe(seed, texts), tmp_path / "out")
    assert line.startswith(f"{SEED}: config.json: refused by the model's code (AttributeError: ")


def test_an_adapter_is_no_seed(family, texts, tmp_path):
    branch(recipe(family.seed, texts, train="lora"), tmp_path / "adapter")
    (line,) = problems_of(branch, recipe(tmp_path / "adapter", texts), tmp_path / "out")
    assert "an adapter; expected a whole model. Merge it into its base first" in line


def test_values_that_cannot_be_meant():
    found = problems_of(BranchRecipe, "", (), "shared", holdout=0.7, lora_target="routers", lora_r=0)
    assert [line.split(": ")[1] for line in found] == ["model", "train", "holdout", "lora_target", "lora_r", "data"]
    with pytest.raises(InputError, match="lora on sharded parameters"):
        BranchRecipe("seed", {"code": "code.txt"}, "lora", fsdp_size=2)


def test_sharding_asks_for_ranks(family, texts, tmp_path):
    assert problems_of(branch, recipe(family.seed, texts, fsdp_size=2), tmp_path / "out") == [
        "recipe: fsdp_size: 2 on 1 ranks; expected the number of ranks. "
        "Start it by `torchrun --nproc-per-node 2 -m btx_merge branch ...`."
    ]


# The command, and several ranks


def flags_of(texts: dict[str, str], out: Path) -> list[str]:
    return [
        f"--data=code={texts['code']}",
        "--max-length=32",
        "--learning-rate=1e-2",
        "--report-to=none",
        f"--output={out}",
    ]


def test_the_command(family, texts, tmp_path):
    """A recipe in a file and flags that win over it; the next command merges, as it stands there."""
    file = tmp_path / "branch.yaml"
    file.write_text(f"model: {family.seed}\ntrain: ff\nmax_steps: 9\nadam_beta2: 0.98\n")
    out = tmp_path / "out"
    words = ["branch", f"--config={file}", *flags_of(texts, out), "--max-steps=2", "--use-cpu"]
    done = warm.run([BTX, *words], level="package", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"written  {out}\ntook ")
    merging, pushing = [line for line in done.stderr.splitlines() if line.startswith("next: ")]
    assert merging == f"next: btx merge --seed {family.seed} --expert code={out} -o MERGED"
    assert pushing == f"next: btx push {out} ORG/NAME"
    record = yaml.safe_load((out / "btx_branch.yaml").read_text())
    assert (record["train"], record["steps"], record["arguments"]["adam_beta2"]) == ("ff", 2, 0.98)
    done = CliRunner().invoke(app, [*merging.split()[2:-1], str(tmp_path / "merged"), "-q"])
    assert done.exit_code == 0, done.output
    assert_complete(tmp_path / "merged")
    done = CliRunner().invoke(app, ["branch", str(family.seed), *flags_of(texts, tmp_path / "x"), "--train=shared"])
    assert done.exit_code == 2
    assert "error: command: --train: 'shared'; expected one of all, ff, lora" in done.stderr
    file.write_text("- a list\n")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert f"error: config: {file}: no keys; expected `data:`" in done.stderr
    (line,) = problems_of(info, str(out))
    assert "Make an expert of it: btx merge" in line


@pytest.mark.parametrize("model", ["untied", pytest.param("tied", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", [[], ["--fsdp-size=2"]], ids=["copies", "shards"])
def test_two_ranks_as_one(texts, tmp_path, model, sizes):
    """Losses within 1e-5, relative; weights of about 1e-2 after six steps within 1e-3. A tied head counts once."""
    seed = save_seed(tmp_path / "seed", tie_word_embeddings=model == "tied")
    settings = {"per_device_train_batch_size": 4}
    alone = branch(recipe(seed, texts, arguments=settings), tmp_path / "alone")
    out = tmp_path / "out"
    command = [*warm.torchrun("package", "-m", "btx_merge", "branch"), seed, *flags_of(texts, out), *sizes]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    words = [*command, "--max-steps=6", "--logging-steps=1", "--per-device-train-batch-size=2", "--json"]
    done = warm.run(words, env=environment, timeout=300, level="torch")
    assert done.returncode == 0, done.stderr[-5000:]
    report = json.loads(done.stdout)
    assert report["world_size"] == 2
    assert report["trained_parameters"] == alone.entry["trained_parameters"]
    assert report["losses"] == pytest.approx(alone.entry["losses"], rel=1e-5)
    for when, scores in alone.entry["held_out_perplexity"].items():
        assert report["held_out_perplexity"][when] == pytest.approx(scores, rel=1e-4)
    assert_complete(out)
    theirs = tensors_of(tmp_path / "alone")
    assert set(tensors_of(out)) == set(theirs)
    for name, tensor in tensors_of(out).items():
        assert (tensor - theirs[name]).abs().max() <= 1e-3, name


@pytest.mark.usefixtures("loaded_here")
def test_a_branch_can_be_published(family, texts, tmp_path):
    """As a Llama, with the record and the picture of the run."""
    branch(recipe(family.seed, texts, train="ff"), tmp_path / "out")
    found = examine(tmp_path / "out", "org/llama-code")
    assert found.kind.text == "a Llama of btx branch"
    assert {"btx_branch.yaml", "training.png", "model.safetensors"} <= set(found.files)
