"""The real command `btx`, as a shell sees it: what it prints where, what it returns, what it imports."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from btx_merge import MergeRecipe, check
from btx_merge.cli.app import app
from tests.conftest import Family
from tests.support import warm
from tests.support.common import assert_complete, edit_json, files_of, save_seed, without_next
from tests.support.warm import BTX

Done = subprocess.CompletedProcess[str]


def btx(*arguments: Any, cwd: Path | None = None, level: str = "command", **environment: str) -> Done:
    """Runs btx with files in place of a terminal, as loud as it is. Nobody is ever shown a traceback.

    Args:
        level: `torch` or `package` for a command that imports torch; the latter has the tests' quiet transformers.
    """
    hushed = ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY")  # for the tests themselves
    inherited = {key: value for key, value in os.environ.items() if key not in hushed or level == "package"}
    done = warm.run([BTX, *arguments], env={**inherited, **environment}, cwd=cwd, level=level)
    assert "Traceback" not in done.stderr + done.stdout
    return done


def sources(family: Family) -> list[str]:
    return ["--seed", str(family.seed), *(f"--expert={name}={model}" for name, model in family.experts.items())]


@pytest.fixture(scope="module")
def merged(family: Family, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """One plain merge by the command."""
    out = tmp_path_factory.mktemp("cli") / "out"
    return out, btx("merge", *sources(family), "-o", out)


# Contract


RECIPE_OPTIONS = {
    *("--recipe", "--seed", "--expert", "--weight", "--base", "--seed-expert", "--no-seed-expert"),
    *(
        "--combine",
        "--head",
        "--density",
        "--scale",
        "--expert-mode",
        "--num-chunks",
        "--fold-norms",
        "--router-init",
    ),
    *("--router-std", "--random-seed", "--num-experts-per-tok", "--router-aux-loss-coef", "--dtype"),
    *("--router-type", "--router-pre-softmax"),
    *("--max-shard-size", "--tokenizer-source", "--untie", "--allow-nonfinite", "--allow-unrelated"),
    *("--domain-text", "--domain-tokens", "--prompt", "--router-ridge", "--regmean-ridge", "--fit-through"),
}
FITTING = {"--statistics", "--device"}
OPTIONS = {
    "merge": {
        *(*RECIPE_OPTIONS, *FITTING, "--output", "-o", "--dry-run", "--print-recipe", "--overwrite", "--workers"),
        *("--quiet", "-q", "--json"),
    },
    "info": {"model", "--json"},
    "check": {*RECIPE_OPTIONS, "--quiet", "-q", "--json"},
    "fit": {
        *("model", "--output", "-o", "--method", "--domain-text", "--prompt", "--domain-tokens", "--router-ridge"),
        *("--fit-through", *FITTING, "--overwrite", "--quiet", "-q", "--json"),
    },
    "edit": {
        *("model", "--output", "-o", "--add", "--drop", "--replace", "--rename", "--shared", "--source", "--weight"),
        *("--base", "--router-init", "--router-std", "--random-seed", "--domain-text", "--domain-tokens"),
        *("--router-ridge", "--num-experts-per-tok", "--allow-nonfinite", "--allow-unrelated", "--device"),
        *("--workers", "--overwrite", "--quiet", "-q", "--json"),
    },
    "routing": {
        *("model", "--output", "-o", "--data", "--against", "--tokens", "--window", "--batch-size", "--dtype"),
        *("--ablation", "--no-ablation", "--page-tokens", "--device", "--overwrite", "--quiet", "-q", "--json"),
    },
    "eval": {
        *("model", "--data", "--no-sources", "--source", "--soup", "--against", "--routing", "--btm"),
        *("--btm-text", "--tokens", "--window"),
        *("--batch-size", "--dtype", "--output", "-o", "--card", "--lm-eval-tasks", "--device", "--overwrite"),
        *("--quiet", "-q", "--json"),
    },
    "push": {
        *("model", "repo_id", "--private", "--revision", "--create-pr", "--commit-message", "--base-model"),
        *("--quiet", "-q", "--json"),
    },
    "export": {
        *("model", "out", "--output", "-o", "--format", "--max-shard-size", "--llama-cpp", "--overwrite"),
        "--workers",
        *("--quiet", "-q", "--json"),
    },
    "extract": {
        *("model", "expert", "--output", "-o", "--max-shard-size", "--overwrite", "--workers"),
        *("--quiet", "-q", "--json"),
    },
    "branch": {
        *("model", "--output", "-o", "--config", "--data", "--train", "--max-length", "--holdout", "--shuffle"),
        *("--lora-target", "--lora-r", "--lora-alpha", "--fsdp-size"),
        *("--max-steps", "--learning-rate", "--per-device-train-batch-size", "--gradient-accumulation-steps"),
        *("--warmup-steps", "--lr-scheduler-type", "--weight-decay", "--logging-steps", "--eval-steps"),
        *("--save-steps", "--seed", "--report-to"),
        *("--resume", "--overwrite", "--quiet", "-q", "--json"),
    },
    "train": {
        *("model", "--output", "-o", "--config", "--data", "--train", "--max-length", "--holdout", "--shuffle"),
        *("--router-grad", "--router-aux-loss-coef", "--router-aux-loss-scope"),
        *("--teacher", "--source", "--lora-target", "--lora-r", "--lora-alpha", "--fsdp-size", "--ep-size"),
        *("--max-steps", "--learning-rate", "--per-device-train-batch-size", "--gradient-accumulation-steps"),
        *("--warmup-steps", "--lr-scheduler-type", "--weight-decay", "--logging-steps", "--eval-steps"),
        *("--save-steps", "--seed", "--report-to"),
        *("--resume", "--overwrite", "--quiet", "-q", "--json"),
    },
}


def test_commands_and_options_are_a_contract() -> None:
    command = typer.main.get_command(app)
    assert {
        name: {flag for option in sub.params for flag in (*option.opts, *option.secondary_opts)}
        for name, sub in command.commands.items()  # type: ignore[attr-defined]
    } == OPTIONS


@pytest.mark.parametrize("command", [[], *([name] for name in OPTIONS)])
def test_help(command: list[str]) -> None:
    done = btx(*command, "--help", COLUMNS="300")
    assert (done.returncode, done.stderr) == (0, "")
    shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", done.stdout))
    if command:
        assert shown >= {option for option in OPTIONS[command[0]] if option.startswith("-")}
    else:
        assert all(name in done.stdout for name in OPTIONS)


def test_no_command_at_all_shows_the_help() -> None:
    done, asked = btx(), btx("--help")
    assert (done.returncode, done.stdout, done.stderr) == (0, asked.stdout, "")


# What is printed where


def test_a_merge(merged: tuple[Path, Done], family: Family) -> None:
    out, done = merged
    assert (done.returncode, [line.split()[:3] for line in done.stderr.splitlines()]) == (
        0,
        [["next:", "btx", "fit"], ["next:", "btx", "train"]],
    )
    assert_complete(out)
    text = done.stdout
    assert "What became of every input tensor" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for name in ("seed", "code", "math"):
        assert "6 (" in rows[name]  # gate, up and down of two layers
        assert "15 (" in rows[name]  # embedding, head, norms, attention
    assert re.search(r"peak memory \d", text)
    assert re.search(r"took\s+\d+\.\d s", text)


def test_one_expert_is_counted_as_one(family: Family, tmp_path: Path) -> None:
    alone = ["--seed", family.seed, "--expert", f"code={family.code}", "--no-seed-expert"]
    told = btx("merge", *alone, "--num-experts-per-tok", 1, "-o", tmp_path / "one", COLUMNS="200").stdout
    assert ", 1 expert, " in told
    assert "1 of 1 expert per token" in btx("info", tmp_path / "one").stdout
    assert "per token (1 of 1 expert), made by" in (tmp_path / "one/README.md").read_text()


def test_the_command_and_the_function_do_the_same(merged: tuple[Path, Done], family: Family, tmp_path: Path) -> None:
    from btx_merge import merge

    merge(MergeRecipe(str(family.seed), family.experts), tmp_path / "out")
    assert files_of(merged[0]) == files_of(tmp_path / "out")


def test_merge_as_json(family: Family, tmp_path: Path) -> None:
    done = btx("merge", *sources(family), "-o", tmp_path / "out", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert set(report) == {
        *("output", "seconds", "peak_memory", "kept_bytes", "sources", "experts", "dtype", "vocab_size", "parameters"),
        *("active_parameters", "bytes_to_read", "bytes_to_write", "working_memory", "shards", "divergence", "fates"),
        *("warnings", "layers", "losses"),
    }
    assert report["output"] == str(tmp_path / "out")
    assert report["experts"] == ["seed", "code", "math"]
    assert report["kept_bytes"] == 0
    assert report["peak_memory"] > 20_000_000
    assert report["bytes_to_write"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert sum(fate["tensors"] for fate in report["fates"]) == 3 * 21


def test_check_shows_the_plan_and_writes_nothing(family: Family, tmp_path: Path) -> None:
    before = {name: files_of(getattr(family, name)) for name in ("seed", "code", "math")}
    (tmp_path / "cwd").mkdir()
    (tmp_path / "tmp").mkdir()
    done = btx("check", *sources(family), cwd=tmp_path / "cwd", TMPDIR=str(tmp_path / "tmp"), COLUMNS="200")
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("llama-seed", "llama-code", "llama-math", "feed-forward", "attention", "in all", "active per token"):
        assert part in done.stdout
    assert "to read / to write" in done.stdout
    assert "memory" in done.stdout
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cwd", "tmp"]
    assert before == {name: files_of(getattr(family, name)) for name in before}


def test_check_as_json_is_what_the_function_returns(family: Family) -> None:
    done = btx("check", *sources(family), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json.loads(
        json.dumps(check(MergeRecipe(str(family.seed), family.experts)).to_dict())
    )


def test_a_wrong_option_is_told_as_json_too(family: Family) -> None:
    done = btx("merge", *sources(family), "--json", "--xyzzy")
    assert done.returncode == 2
    assert json.loads(done.stdout) == {"error": "NoSuchOption", "problems": ["No such option: --xyzzy"]}
    assert "No such option: --xyzzy" in done.stderr


def test_quiet_prints_nothing(family: Family, tmp_path: Path) -> None:
    done = btx("merge", *sources(family), "-o", tmp_path / "out", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert_complete(tmp_path / "out")


def test_quiet_still_warns(family: Family, tmp_path: Path) -> None:
    done = btx("merge", "--seed", family.seed, "--expert", f"twin={family.seed}", "-o", tmp_path / "out", "-q")
    assert (done.returncode, done.stdout) == (0, "")
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(
        r"warning: twin: weights: identical to seed in all [\d,]+ sampled values\. Two copies .*", line
    )


def test_quiet_and_json(family: Family, tmp_path: Path) -> None:
    done = btx("merge", *sources(family), "-o", tmp_path / "out", "-q", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["experts"] == ["seed", "code", "math"]


def test_a_bar_only_on_a_terminal(family: Family, tmp_path: Path) -> None:
    """The same merge with a pseudo-terminal as stderr: there the bar is; with --quiet not even there."""
    for flag in ([], ["--quiet"]):
        done = warm.run_on_terminal([BTX, "merge", *sources(family), "-o", tmp_path / f"out{len(flag)}", *flag])
        assert done.returncode == 0
        assert "merging" not in done.stdout
        assert ("merging" in done.stderr) == (not flag)
        assert not (flag and done.stderr)


def test_what_peft_merges_makes_no_noise(family: Family, tmp_path: Path) -> None:
    """transformers and peft have bars of their own, which do not ask whether stderr is a terminal."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, use_dora=True)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(family.seed), config)
    with torch.no_grad():
        [parameter.add_(0.01) for parameter in model.parameters() if parameter.requires_grad]
    model.save_pretrained(tmp_path / "dora")
    done = btx(
        *("merge", "--seed", family.seed, "--expert", f"dora={tmp_path / 'dora'}", "-o", tmp_path / "out", "--quiet"),
        level="torch",
    )
    # torchao, which peft imports where it is installed (`make slow`), speaks of other machines' files
    noise = [line for line in done.stderr.splitlines() if "torchao" not in line and "torch/utils/_pytree" not in line]
    assert (done.returncode, noise) == (0, [])


def test_a_recipe_file(merged: tuple[Path, Done], family: Family, tmp_path: Path) -> None:
    """From any folder, by itself or with flags."""
    experts = "\n".join(f"  {name}: {os.path.relpath(model, tmp_path)}" for name, model in family.experts.items())
    (tmp_path / "merge.yaml").write_text(f"seed: {os.path.relpath(family.seed, tmp_path)}\nexperts:\n{experts}\n")
    done = btx("merge", "--recipe", tmp_path / "merge.yaml", "-o", tmp_path / "out", "-q", cwd=family.seed)
    assert (done.returncode, done.stderr) == (0, "")
    assert files_of(tmp_path / "out") == files_of(merged[0])
    done = btx("check", "--recipe", "merge.yaml", "--dtype", "float16", "--no-seed-expert", "--json", cwd=tmp_path)
    checked = json.loads(done.stdout)
    assert (checked["dtype"], checked["experts"]) == ("float16", ["code", "math"])


@pytest.mark.parametrize("command", ["export", "extract"])
def test_an_export_and_an_extraction(command: str, merged: tuple[Path, Done], tmp_path: Path) -> None:
    arguments = {"export": [tmp_path / "out"], "extract": ["code", "-o", tmp_path / "out"]}[command]
    done = btx(command, merged[0], *arguments, COLUMNS="200", level="package")
    untrained = "warning: model: routers: have not been trained yet"  # an extract has none
    assert done.returncode == 0
    assert [line.startswith(untrained) for line in without_next(done.stderr).splitlines()] == [True] * (
        command == "export"
    )
    assert re.search(
        rf"written +{tmp_path / 'out'}: \d+\.\d\d KB in 1 weights file, 0\.\d\d M parameters", done.stdout
    )
    assert re.search(r"took +\d+\.\d s, peak memory \d", done.stdout)
    expected = files_of(tmp_path / "out")
    done = btx(
        command,
        merged[0],
        *arguments,
        "--overwrite",
        "--json",
        "--workers",
        "1",
        "--max-shard-size",
        "50KB",
        level="package",
    )
    report = json.loads(done.stdout)
    assert set(report) == {
        *("output", "parameters", "files", "nbytes", "kept_bytes", "seconds", "peak_memory", "warnings")
    }
    assert report["output"] == str(tmp_path / "out")
    assert len(report["files"]) > 1
    assert report["nbytes"] == sum((tmp_path / "out" / name).stat().st_size for name in report["files"])
    assert (report["kept_bytes"], len(report["warnings"])) == (0, int(command == "export"))
    done = btx(command, merged[0], *arguments, "--overwrite", "--quiet", level="package")
    assert (done.returncode, done.stdout) == (0, "")
    assert files_of(tmp_path / "out") == expected


def test_where_an_export_goes(merged: tuple[Path, Done], tmp_path: Path) -> None:
    assert errors_of(btx("export", merged[0], level="package")) == ["command: OUT: missing; expected one folder"]
    twice = btx("export", merged[0], tmp_path / "a", "-o", tmp_path / "b", level="package")
    assert errors_of(twice) == ["command: OUT: given twice; expected one folder"]
    assert btx("export", merged[0], "-o", tmp_path / "out", "-q", level="package").returncode == 0
    assert (tmp_path / "out/config.json").exists()
    (line,) = errors_of(btx("export", merged[0], tmp_path / "out", level="package"))
    assert line.startswith(f"output: {tmp_path / 'out'}: not empty; expected an empty or a new folder.")
    (line,) = errors_of(btx("extract", merged[0], "cod", "-o", tmp_path / "new", level="package"))
    assert line == "model: config.json: expert_names: no expert 'cod'; expected one of seed, code, math"


def test_an_export_that_another_program_reads_otherwise(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    seed = save_seed(tmp_path / "seed", rope_parameters=rope)
    btx("merge", "--seed", seed, "--expert", f"twin={seed}", "-o", tmp_path / "merged", "-q")
    done = btx("export", tmp_path / "merged", tmp_path / "out", "-q", level="package")
    assert (done.returncode, done.stdout) == (0, "")
    line, untrained = sorted(done.stderr.splitlines())
    assert "routers: have not been trained yet" in untrained
    assert line.startswith(
        "warning: model: config.json: rope_parameters: dynamic: beyond max_position_embeddings vLLM and llama.cpp do"
    )


# Refusals


def errors_of(done: Done, code: int = 2) -> list[str]:
    """The lines after `error: `; there is nothing else on stderr, and nothing on stdout."""
    assert (done.returncode, done.stdout) == (code, "")
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines), lines
    return [line.removeprefix("error: ") for line in lines]


@pytest.fixture(scope="module")
def odd(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A code expert with another rms_norm_eps."""
    folder = tmp_path_factory.mktemp("odd") / "odd"
    shutil.copytree(family.code, folder)
    edit_json(folder / "config.json", rms_norm_eps=0.5)
    return folder


def test_one_line_per_problem(family: Family, odd: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(odd, again)
    edit_json(again / "config.json", hidden_act="gelu")
    arguments = ("--seed", family.seed, "--expert", f"odd={odd}", "--expert", f"again={again}")
    done = btx("merge", *arguments, "-o", tmp_path / "out")
    lines = errors_of(done)
    assert [line.split(";")[0] for line in lines] == [
        "odd: config.json: rms_norm_eps: 0.5",
        "again: config.json: hidden_act: 'gelu'",
        "again: config.json: rms_norm_eps: 0.5",
    ]
    assert not list(tmp_path.glob("out*"))
    assert errors_of(btx("check", *arguments)) == lines


def test_a_refusal_as_json(family: Family, odd: Path) -> None:
    done = btx("check", "--seed", family.seed, "--expert", f"odd={odd}", "--json")
    assert done.returncode == 2
    answer = json.loads(done.stdout)
    assert answer["error"] == "InputError"
    assert [f"error: {line}" for line in answer["problems"]] == done.stderr.splitlines()


def test_a_failure_is_1(family: Family, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(family.code, spoilt)
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, spoilt / "model.safetensors", {"format": "pt"})
    arguments = ("merge", "--seed", family.seed, "--expert", f"spoilt={spoilt}", "-o", tmp_path / "out")
    line = (
        "spoilt: model.safetensors: model.norm.weight holds nan at row 3. "
        "Repair or leave out this source; --allow-nonfinite goes on all the same."
    )
    assert errors_of(btx(*arguments), 1) == [line]
    done = btx(*arguments, "--json")
    assert (done.returncode, json.loads(done.stdout)) == (1, {"error": "NonFiniteError", "problems": [line]})
    done = btx(*arguments, "--allow-nonfinite", "--quiet")
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "out/model.safetensors").exists()
    assert all(line.startswith(("note: ", "warning: ")) for line in done.stderr.splitlines()), done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "x"], "Missing option '--output'"),
        (["merge", "--nonsense"], "No such option: --nonsense"),
        (["check", "--density", "much"], "Invalid value for '--density'"),
        (["nonsense"], "No such command 'nonsense'"),
        (["merge", "--workers", "0", "-o", "x"], "Invalid value for '--workers'"),
    ],
)
def test_wrong_use_is_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = btx(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_given_at_all(tmp_path: Path) -> None:
    assert errors_of(btx("check", cwd=tmp_path)) == [
        "command: seed: missing; expected the model that all experts grew from"
    ]


# The output


def test_a_folder_that_is_not_empty(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    (line,) = errors_of(btx("merge", *sources(family), "-o", out))
    assert line == (
        f"output: {out}: not empty; expected an empty or a new folder. "
        "Give another --output, or --overwrite to replace it when the new model is complete."
    )
    assert files_of(tmp_path) == {"out/model.safetensors": b"mine"}
    done = btx("merge", *sources(family), "-o", out, "--overwrite", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert_complete(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_other_things_is_never_replaced(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for further in ([], ["--overwrite"]):
        (line,) = errors_of(btx("merge", *sources(family), "-o", out, *further))
        assert line == (
            f"output: {out}: not empty, and it holds neither a model nor a report; "
            "expected a new folder, an empty one or an earlier result. "
            "Give another --output, or remove the folder yourself."
        )
        assert files_of(tmp_path) == {"out/thesis.txt": b"mine"}


def test_overwrite_replaces_only_by_what_is_complete(family: Family, odd: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    errors_of(btx("merge", "--seed", family.seed, "--expert", f"odd={odd}", "-o", out, "--overwrite"))
    assert files_of(tmp_path) == {"out/model.safetensors": b"mine"}


def test_a_file_in_the_way(family: Family, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    (line,) = errors_of(btx("merge", *sources(family), "-o", tmp_path / "out", "--overwrite"))
    assert line.startswith(f"output: {tmp_path / 'out'}: a file; expected a folder that is empty or not there yet")
    (line,) = errors_of(btx("merge", *sources(family), "-o", tmp_path / "out" / "below"))
    assert line.startswith(f"output: {tmp_path / 'out'}: a file; expected a folder")
    assert files_of(tmp_path) == {"out": b"mine"}


@pytest.mark.parametrize("place", ["itself", "inside", "around"])
def test_an_output_that_overlaps_with_a_source(place: str, family: Family, tmp_path: Path) -> None:
    """Replacing it would destroy what is read."""
    room = tmp_path / "room"
    shutil.copytree(family.seed, room / "seed")
    (room / "config.json").write_text("{}")  # all of it could be an earlier result
    out = {"itself": room / "seed", "inside": room / "seed" / "out", "around": room}[place]
    before = files_of(tmp_path)
    done = btx("merge", "--seed", room / "seed", "--expert", f"code={family.code}", "-o", out, "--overwrite")
    (line,) = errors_of(done)
    assert line.startswith(f"output: {out}: overlaps with the source seed, {room / 'seed'}; expected a folder apart")
    assert files_of(tmp_path) == before


def test_an_output_that_is_a_link_to_a_source(family: Family, tmp_path: Path) -> None:
    shutil.copytree(family.seed, tmp_path / "seed")
    (tmp_path / "out").symlink_to(tmp_path / "seed")
    before = files_of(tmp_path / "seed")
    done = btx(
        "merge", "--seed", tmp_path / "seed", "--expert", f"c={family.code}", "-o", tmp_path / "out", "--overwrite"
    )
    assert "overlaps with the source seed" in errors_of(done)[0]
    assert files_of(tmp_path / "seed") == before


def test_a_note_when_an_unfinished_merge_was_of_something_else(family: Family, tmp_path: Path) -> None:
    spoilt = save_seed(tmp_path / "spoilt")
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, spoilt / "model.safetensors", {"format": "pt"})
    errors_of(btx("merge", "--seed", family.seed, "--expert", f"x={spoilt}", "-o", tmp_path / "out"), 1)
    assert (tmp_path / "out.btx-partial").is_dir()
    assert not (tmp_path / "out").exists()
    done = btx("merge", *sources(family), "-o", tmp_path / "out", "-q")
    assert done.returncode == 0
    assert_complete(tmp_path / "out")
    assert [line.split(":")[0] for line in done.stderr.splitlines()] in (["note"], [])


# Imports


def imported_by(code: str, tmp_path: Path) -> set[str]:
    """Modules that a fresh Python has loaded after running some code."""
    code += "\nimport sys, json\nprint(json.dumps(sorted(name for name in sys.modules if '.' not in name)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"torch", "transformers", "peft", "huggingface_hub", "tokenizers"}


def test_the_command_starts_light(tmp_path: Path) -> None:
    """Help and every refusal of a flag should take no longer than Python itself."""
    loaded = imported_by("import btx_merge.cli.app", tmp_path)
    assert "btx_merge" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("command", ["check", "merge"])
def test_a_plain_merge_needs_no_torch(command: str, family: Family, tmp_path: Path) -> None:
    """Nor transformers: the import alone would take longer and more memory than the merge."""
    output = ["-o", str(tmp_path / "out"), "--quiet"] if command == "merge" else []
    arguments = [command, *sources(family), *output]
    loaded = imported_by(f"from btx_merge.cli.app import app\napp({arguments!r}, standalone_mode=False)", tmp_path)
    assert not loaded & HEAVY
    assert (tmp_path / "out/model.safetensors").exists() == (command == "merge")


@pytest.mark.parametrize("command", [["export"], ["extract", "code"]])
def test_an_export_needs_no_torch_either(command: list[str], merged: tuple[Path, Done], tmp_path: Path) -> None:
    """Only a tokenizer does, which is compared by transformers."""
    model = shutil.copytree(merged[0], tmp_path / "model")
    for file in model.glob("*token*"):
        file.unlink()
    arguments = [command[0], str(model), *command[1:], "-o", str(tmp_path / "out"), "-q"]
    loaded = imported_by(f"from btx_merge.cli.app import app\napp({arguments!r}, standalone_mode=False)", tmp_path)
    assert not loaded & HEAVY
    assert (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("mode", ["split", "blend"])
def test_other_modes_need_no_torch_either(mode: str, family: Family, tmp_path: Path) -> None:
    arguments = ["merge", *sources(family), "-o", str(tmp_path / "out"), "-q", "--expert-mode", mode, "--fold-norms"]
    loaded = imported_by(f"from btx_merge.cli.app import app\napp({arguments!r}, standalone_mode=False)", tmp_path)
    assert not loaded & HEAVY


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["--version"]])
def test_a_full_disk_behind_stdout(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([BTX, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: stdout: No space left on device\n")
