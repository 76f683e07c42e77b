"""What the README shows runs: its commands and its Python, with tiny checkpoints in the models' places."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest

from btx_merge.llama import EMBEDDING
from tests import warm
from tests.common import assert_complete, tensors_of
from tests.hub_server import WRITER, Hub
from tests.warm import BTX

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(family, tmp_path) -> Path:
    """A folder in which the README's names are tiny checkpoints; ids of the Hub are folders of that name here."""
    places = {"meta-llama/Llama-3.2-1B": family.seed, "org/llama-code": family.code, "llama-math": family.math}
    places |= {"org/llama-bio": family.math, "org/llama-math-2": family.code}
    for name, source in places.items():
        shutil.copytree(source, tmp_path / name)
    return tmp_path


@pytest.fixture
def hub(tmp_path_factory) -> Iterator[Hub]:
    server = Hub(tmp_path_factory.mktemp("hub"))
    yield server
    server.close()


def test_the_commands_and_the_recipe(folder, hub):
    (recipe,) = blocks("yaml")
    (folder / "merge.yaml").write_text(recipe)
    write_texts(folder)
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("btx ")]
    verbs = [command.split()[1] for command in commands]
    assert verbs == [
        "merge",
        "merge",
        "fit",
        "check",
        "info",
        "merge",
        "train",
        "edit",
        "edit",
        "edit",
        "export",
        "extract",
        "push",
    ]
    for verb, command in zip(verbs, commands, strict=True):
        if verb not in ("merge", "check"):
            shutil.copytree(folder / "done-0", folder / "llama-btx", dirs_exist_ok=True)
        command = command.replace("1000", "2 --use-cpu --max-length 32")
        environment = hub.environment(folder / "home", HF_TOKEN=WRITER) if verb == "push" else None
        level = "command" if verb in ("info", "push") else "package"
        done = warm.run([BTX, *shlex.split(command)[1:]], cwd=folder, env=environment, level=level)
        assert done.returncode == 0, done.stderr
        if verb not in ("check", "info", "push"):
            words = command.split()
            output = folder / (words[words.index("-o") + 1] if "-o" in words else words[3])
            assert_complete(output)
            shutil.move(output, folder / f"done-{len(list(folder.glob('done-*')))}")
        shutil.rmtree(folder / "llama-btx", ignore_errors=True)
    plain, weighted = (tensors_of(folder / f"done-{number}")[EMBEDDING] for number in (0, 3))
    assert not plain.equal(weighted)  # the file's weight was read
    assert hub.repo("org/llama-btx")["private"]
    assert (hub.folder("org/llama-btx") / "config.json").exists()


def write_texts(folder: Path) -> None:
    """The README's texts, of the tiny tokenizer's words."""
    rows = [{"text": " ".join(f"w{(7 * row + word) % 120}" for word in range(50))} for row in range(20)]
    for name in ("code", "bio"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "math").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "math/part.parquet")


def run(folder: Path, *parts: str) -> list[str]:
    done = warm.run([sys.executable, "-c", "\n".join(parts)], cwd=folder, level="transformers")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_python(folder):
    loading, merging, *_ = blocks("python")
    shown = "print(type(model).__name__, model.config.expert_names, len(tokenizer))"
    assert run(folder, merging, loading, shown)[-1] == "BTXForCausalLM ['seed', 'code'] 128"


@pytest.mark.parametrize("quantised", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_python_on_a_merged_model(folder, quantised):
    """One block after the other, on a merge of the recipe that is shown."""
    loading, _, *others = blocks("python")
    others = [block for block in others if ("torchao" in block) == quantised and "TrainRecipe" not in block]
    (folder / "merge.yaml").write_text(blocks("yaml")[0])
    done = warm.run([BTX, "merge", "--recipe", "merge.yaml", "-o", "llama-btx", "-q"], cwd=folder)
    assert done.returncode == 0, done.stderr
    inputs = "inputs = tokenizer('w1 w2', return_tensors='pt')"
    shown = "print(model.config.router_type, model(**inputs).logits.isfinite().all().item())"
    script = [loading, inputs, *(f"{block}\n{shown}" for block in others)]
    types = [line.split()[0] for line in run(folder, *script) if line.endswith("True")]
    assert types == (["top_k"] if quantised else 3 * ["sample_top_1"])


def test_the_python_that_trains(folder):
    (training,) = [block for block in blocks("python") if "TrainRecipe" in block]
    (folder / "merge.yaml").write_text(blocks("yaml")[0])
    done = warm.run([BTX, "merge", "--recipe", "merge.yaml", "-o", "llama-btx", "-q"], cwd=folder)
    assert done.returncode == 0, done.stderr
    write_texts(folder)
    training = training.replace('{"max_steps": 1000}', '{"max_steps": 2, "use_cpu": True}')
    assert run(folder, training, "print(report.entry['steps'])")[-1] == "2"
    assert_complete(folder / "llama-shared")


def test_the_flags_of_btx_train_are_named():
    from btx_merge.finetuning import OPTION_NAMES

    for name in OPTION_NAMES:
        assert f"`--{name.replace('_', '-')}`" in README, name


def test_the_options_table_names_every_key_of_a_recipe():
    from dataclasses import fields

    from btx_merge import MergeRecipe

    for item in fields(MergeRecipe):
        assert item.name in README or f"--{item.name.replace('_', '-')}" in README, item.name
