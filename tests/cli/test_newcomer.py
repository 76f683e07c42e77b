"""What a newcomer asks of the command: its versions, completion, a look before the merge, a recipe to start from."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import struct
import subprocess
import termios
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from btx_merge import ExpertSpec, MergeRecipe, merge
from btx_merge.merging.template import recipe_template
from btx_merge.values import field_descriptions
from tests.cli.test_app import BTX, HEAVY, btx, errors_of, imported_by, sources
from tests.conftest import Family
from tests.support.common import files_of, save_seed

# Versions


def test_the_versions(tmp_path: Path) -> None:
    done = btx("--version")
    assert (done.returncode, done.stderr) == (0, "")
    name, python, *others = done.stdout.splitlines()
    assert name == f"btx-merge {version('btx-merge')}"
    assert python.startswith("Python 3.")
    assert others == [f"{package} {version(package)}" for package in ("torch", "transformers", "peft")]
    loaded = imported_by("from btx_merge.cli.app import app\napp(['--version'], standalone_mode=False)", tmp_path)
    assert not loaded & HEAVY


# Completion


class Bash:
    """A bash on a terminal, as a person has it, in which the command's completion is installed."""

    def __init__(self, folder: Path):
        home = folder / "home"
        home.mkdir()
        (folder / "llama-btx").mkdir()
        (home / ".bashrc").write_text("PS1='$ '\n")
        environment = {"HOME": str(home), "PATH": f"{BTX.parent}:{os.environ['PATH']}", "TERM": "dumb"}
        install = ["bash", "-c", "btx --install-completion; true"]  # what is run last would take bash's place
        done = subprocess.run(install, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
        assert "bash completion installed" in done.stdout, done
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--rcfile", str(home / ".bashrc"), "-i"], environment)
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 500, 0, 0))  # no line is broken
        self.shown("$ ")

    def shown(self, awaited: str) -> str:
        """Read until the terminal shows `awaited`, which may be nothing in 20 s, and return all that was shown."""
        text, end = "", time.monotonic() + 20
        while awaited not in text and time.monotonic() < end:
            if select.select([self.terminal], [], [], 0.1)[0]:
                text += os.read(self.terminal, 65536).decode()
        return text

    def complete(self, line: str, awaited: str) -> str:
        """Type a line with a tab behind it, read what comes, and clear the line."""
        os.write(self.terminal, f"{line}\t".encode())
        text = self.shown(awaited)
        os.write(self.terminal, b"\x15")
        return text

    def close(self) -> None:
        os.close(self.terminal)
        os.waitpid(self.process, 0)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_completion_in_bash(tmp_path: Path) -> None:
    """Of commands, options, their values, and of folders."""
    bash = Bash(tmp_path)
    try:
        for line, awaited in (
            ("btx mer", "btx merge "),
            ("btx merge --router-init pro", "--router-init prompts "),
            ("btx export --max", "--max-shard-size "),
            ("btx fit lla", "btx fit llama-btx/"),
        ):
            assert awaited in bash.complete(line, awaited)
    finally:
        bash.close()


def test_the_completion_can_be_shown() -> None:
    done = subprocess.run(["bash", "-c", f"{BTX} --show-completion; true"], capture_output=True, text=True, timeout=60)
    assert "complete -o default -F _btx_completion btx" in done.stdout


# A look before the merge


def test_a_quiet_check_says_what_deserves_a_look_only(family: Family) -> None:
    done = btx("check", *sources(family), "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = btx("check", "--seed", family.seed, "--expert", f"twin={family.seed}", "-q")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("warning: twin:")
    assert len(errors_of(btx("check", "--seed", family.seed, "--expert", "gone=./gone", "-q"))) == 1


def test_a_dry_run_names_every_file_and_writes_none(family: Family, tmp_path: Path) -> None:
    arguments = ("merge", *sources(family), "-o", tmp_path / "new" / "out", "--max-shard-size", "300KB")
    done = btx(*arguments, "--dry-run", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    report = json.loads(done.stdout)
    assert report["output"] == str(tmp_path / "new" / "out")
    shown = btx(*arguments, "--dry-run", COLUMNS="300").stdout
    assert f"Would be written to {tmp_path / 'new' / 'out'}" in shown
    assert list(tmp_path.iterdir()) == []
    assert btx(*arguments, "-q").returncode == 0
    written = {name: len(content) for name, content in files_of(tmp_path / "new" / "out").items()}
    assert report["files"] == written
    assert all(name in shown for name in written)


def test_a_dry_run_refuses_what_the_merge_would(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    arguments = ("merge", *sources(family), "--dry-run", "-o")
    (line,) = errors_of(btx(*arguments, out))
    assert line.startswith(f"output: {out}: not empty")
    done = btx(*arguments, out, "--overwrite", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert files_of(tmp_path) == {"out/model.safetensors": b"mine"}
    (line,) = errors_of(btx(*arguments, family.seed / "out"))
    assert "overlaps with the source seed" in line


@pytest.mark.slow
def test_a_dry_run_of_an_adapter_leaves_nothing_behind(tmp_path: Path) -> None:
    """One that peft has to merge itself, for which a merge makes a folder beside the output."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    seed = save_seed(tmp_path / "seed")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, use_dora=True)
    get_peft_model(LlamaForCausalLM.from_pretrained(seed), config).save_pretrained(tmp_path / "dora")
    before = files_of(tmp_path)
    output = tmp_path / "new" / "out"
    done = btx("merge", "--seed", seed, "--expert", f"dora={tmp_path / 'dora'}", "-o", output, "--dry-run", "-q")
    assert (done.returncode, done.stdout) == (0, "")
    assert files_of(tmp_path) == before
    assert not output.parent.exists()


def test_a_merge_needs_a_place(family: Family) -> None:
    assert errors_of(btx("merge", *sources(family))) == [
        "command: --output: missing; expected a folder for the merged model"
    ]


# A recipe to start from


def test_a_recipe_with_all_options_to_start_from(tmp_path: Path) -> None:
    """Each with the default that it has, behind what it means; filled in, it can be merged."""
    done = btx("merge", "--print-recipe", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    values = yaml.safe_load(done.stdout)
    assert [*values, "resolved"] == [item.name for item in fields(MergeRecipe)]
    assert values["seed"] is None
    assert MergeRecipe.from_dict({**values, "seed": "a", "experts": {"b": "c"}}) == MergeRecipe("a", {"b": "c"})
    text = " ".join(line.removeprefix("# ") for line in done.stdout.splitlines())
    descriptions = dict(field_descriptions(MergeRecipe))
    del descriptions["resolved"]  # written by a merge, not by hand
    for description in (*descriptions.values(), *field_descriptions(ExpertSpec).values()):
        assert description in text
    for cls in (MergeRecipe, ExpertSpec):
        assert set(field_descriptions(cls)) == {item.name for item in fields(cls)}


def test_a_printed_recipe_holds_the_flags_and_can_be_fed_back(family: Family, tmp_path: Path) -> None:
    """From another folder too: a recipe file's folders are relative to itself, those of flags are not."""
    (tmp_path / "here").mkdir()
    there = tmp_path / "there"
    there.mkdir()
    for name, folder in (("seed", family.seed), ("code", family.code), ("math", family.math)):
        shutil.copytree(folder, tmp_path / "here" / name)
    flags = ("--seed", "seed", "--expert", "code=code", "--expert", "math=./math", "--weight", "math=2.5")
    flags = (*flags, "--combine", "weighted", "--no-seed-expert", "--router-std", "1e-5", "--max-shard-size", "300KB")
    done = btx("merge", *flags, "--print-recipe", cwd=tmp_path / "here")
    assert (done.returncode, done.stderr) == (0, "")
    (there / "merge.yaml").write_text(done.stdout)
    recipe = MergeRecipe.from_yaml(there / "merge.yaml")
    assert (recipe.combine, recipe.seed_expert, recipe.router_std) == ("weighted", False, 1e-5)
    assert recipe.experts["math"] == ExpertSpec(str(tmp_path / "here" / "math"), 2.5)
    assert btx("merge", "--recipe", there / "merge.yaml", "-o", there / "out", "-q").returncode == 0
    assert btx("merge", *flags, "-o", "out", "-q", cwd=tmp_path / "here").returncode == 0
    assert files_of(there / "out") == files_of(tmp_path / "here" / "out")


def test_a_printed_recipe_holds_texts_and_prompts(texts: dict[str, str], tmp_path: Path) -> None:
    arguments = [f"--domain-text={name}={os.path.relpath(text, tmp_path)}" for name, text in texts.items()]
    arguments += ["--expert=code=org/c", "--expert=math=org/m", "--seed=org/s", "--router-init=ridge"]
    printed = btx("merge", *arguments, "--print-recipe", cwd=tmp_path).stdout
    recipe = MergeRecipe.from_dict(yaml.safe_load(printed))
    for name, text in recipe.domain_text.items():
        (reference,) = text.references
        assert os.path.isabs(reference)
        assert os.path.samefile(reference, texts[name])
    lines = {"code": ["def main():", "# a: comment"], "math": ['"Let x"']}
    printed = recipe_template({"router_init": "prompts", "prompts": lines})
    assert yaml.safe_load(printed)["prompts"] == lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--density", "5"], "command: --density: 5.0; expected in (0, 1]"),
        (["--expert", "code"], "command: --expert: code; expected NAME=VALUE, such as code=./llama-code"),
        (["--weight", "code=2"], "command: --weight: no expert code; expected one of the experts, of which there are"),
    ],
)
def test_a_wrong_flag_is_not_printed_into_a_recipe(arguments: list[str], said: str) -> None:
    (line,) = errors_of(btx("merge", "--print-recipe", *arguments))
    assert line.startswith(said)


def test_what_is_missing_is_left_to_be_filled_in() -> None:
    done = btx("merge", "--print-recipe", "--router-init", "ridge", "--expert", "code=org/code")
    values = yaml.safe_load(done.stdout)
    assert (done.returncode, values["router_init"], values["domain_text"]) == (0, "ridge", {})
    assert values["experts"] == {"code": "org/code"}


def test_a_merged_models_recipe_as_a_template(family: Family, tmp_path: Path) -> None:
    """`--recipe` goes in, too: what it says, with every option explained."""
    for folder in (family.seed, family.code):
        shutil.copytree(folder, tmp_path / folder.name)
    seed, code = tmp_path / family.seed.name, tmp_path / family.code.name
    merge(MergeRecipe(str(seed), {"code": str(code)}, router_std=0.25), tmp_path / "merged")
    values = yaml.safe_load(btx("merge", "--recipe", tmp_path / "merged", "--print-recipe").stdout)
    assert (values["seed"], values["experts"]["code"]["model"]) == (str(seed), str(code))
    assert (values["router_std"], values["dtype"]) == (0.25, "float32")
