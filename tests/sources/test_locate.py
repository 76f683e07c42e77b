"""Sources from the Hub: the real client of huggingface_hub against a small server in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from btx_merge import MergeRecipe, merge
from tests.conftest import Family
from tests.support import warm
from tests.support.common import edit_json, files_of, grow, tensors_of, without_next
from tests.support.hub_server import Hub
from tests.support.warm import BTX


@pytest.fixture(scope="module")
def hub(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """org/seed (one file), org/code (a tag beside main), org/math (shards), and what they hold beside a model."""
    server = Hub(tmp_path_factory.mktemp("hub"))
    littered = tmp_path_factory.mktemp("littered") / "code"
    shutil.copytree(family.code, littered)
    extra = [
        *(
            "modeling_evil.py",
            "pytorch_model.bin",
            "training_args.bin",
            "trainer_state.json",
            "logo.png",
            "model.gguf",
        ),
        *("flax_model.msgpack", "onnx/config.json", "onnx/model.onnx", "original/tokenizer.model", "notes.txt"),
        *("checkpoint-1/config.json", "checkpoint-1/model.safetensors", "checkpoint-1/tokenizer.json"),
    ]
    for name in extra:
        (littered / name).parent.mkdir(exist_ok=True)
        (littered / name).write_bytes(b"not for a merge")
    (littered / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n![](logo.png)\n")
    seed = tmp_path_factory.mktemp("seed") / "seed"
    shutil.copytree(family.seed, seed)
    (seed / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    math = tmp_path_factory.mktemp("math") / "math"
    shutil.copytree(family.math, math)
    (math / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    server.add("org/seed", seed)
    server.add("org/code", grow(family.seed, tmp_path_factory.mktemp("newer") / "code", random_seed=9))
    server.add("org/code", littered, ref="v1")
    server.add("org/math", math)
    yield server
    server.close()


def btx(
    hub: Hub, home: Path, *arguments: str, level: str = "command", **environment: str
) -> subprocess.CompletedProcess[str]:
    return warm.run([BTX, *arguments], env=hub.environment(home, **environment), cwd=home.parent, level=level)


def commit_of(hub: Hub, repo_id: str, ref: str = "main") -> str:
    return str(hub.repo(repo_id)["refs"][ref])


SOURCES = ("--seed", "org/seed", "--expert", "code=org/code@v1", "--expert", "math=org/math@main")


@pytest.fixture(scope="module")
def merged(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One merge of three repositories; the folder holds `out`, the cache `home` and `requests` of the server."""
    room = tmp_path_factory.mktemp("merged")
    (room / "home").mkdir()
    done = btx(hub, room / "home", "merge", *SOURCES, "-o", str(room / "out"))
    assert (done.returncode, without_next(done.stderr)) == (0, "")
    (room / "requests").write_text("\n".join(hub.requests()))
    return room


def test_a_merge_from_the_hub_is_the_merge_of_the_folders(merged: Path, family: Family, tmp_path: Path) -> None:
    merge(MergeRecipe(str(family.seed), family.experts), tmp_path / "out")
    assert (merged / "out/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_only_what_a_merge_needs_is_downloaded(merged: Path, hub: Hub) -> None:
    lines = (merged / "requests").read_text().splitlines()
    got = {line.split()[1] for line in lines if line.startswith("GET") and "/resolve/" in line}
    small = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    shards = {path.name for path in (hub.root / "org/math" / commit_of(hub, "org/math")).glob("*.safetensors")}
    assert len(shards) > 2
    expected = {
        ("org/seed", "main"): small | {"model.safetensors"},
        ("org/code", "v1"): small | {"model.safetensors"},
        ("org/math", "main"): small | shards | {"model.safetensors.index.json"},
    }
    assert got == {
        f"/{repo_id}/resolve/{commit_of(hub, repo_id, ref)}/{name}"
        for (repo_id, ref), names in expected.items()
        for name in names
    }


def test_the_commits_are_written_down(merged: Path, hub: Hub) -> None:
    recipe = yaml.safe_load((merged / "out/btx_recipe.yaml").read_text())
    assert recipe["seed"] == f"org/seed@{commit_of(hub, 'org/seed')}"
    assert {name: spec["model"] for name, spec in recipe["experts"].items()} == {
        "code": f"org/code@{commit_of(hub, 'org/code', 'v1')}",
        "math": f"org/math@{commit_of(hub, 'org/math')}",
    }
    card = (merged / "out/README.md").read_text()
    for name, repo_id, ref, expert in (
        ("seed", "org/seed", "main", 0),
        ("code", "org/code", "v1", 1),
        ("math", "org/math", "main", 2),
    ):
        url, commit = f"https://huggingface.co/{repo_id}", commit_of(hub, repo_id, ref)
        assert f"| {name} | [{repo_id}]({url}) | {commit} | {expert} |" in card.splitlines()


def test_the_cards_metadata(merged: Path) -> None:
    card = (merged / "out/README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == ["org/seed", "org/code", "org/math"]
    assert metadata["base_model_relation"] == "merge"
    assert metadata["license"] == "apache-2.0"
    assert metadata["language"] == ["en"]
    assert str(merged) not in card


def test_the_written_recipe_merges_again_and_offline(merged: Path, hub: Hub) -> None:
    """By its commits, from the cache: not a single question to the Hub."""
    before = len(hub.requests())
    arguments = ("merge", "--recipe", str(merged / "out/btx_recipe.yaml"), "-o", str(merged / "again"))
    done = btx(hub, merged / "home", *arguments, HF_HUB_OFFLINE="1")
    assert (done.returncode, without_next(done.stderr)) == (0, "")
    assert len(hub.requests()) == before
    assert (merged / "again/model.safetensors").read_bytes() == (merged / "out/model.safetensors").read_bytes()


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_second_run_needs_no_hub(environment: dict[str, str], merged: Path, hub: Hub) -> None:
    """By the names of branches and tags too, as the first one resolved them."""
    done = btx(hub, merged / "home", "check", *SOURCES, "--json", **environment)
    assert done.returncode == 0, done.stderr
    revisions = {source["name"]: source["revision"] for source in json.loads(done.stdout)["sources"]}
    assert revisions["code"] == commit_of(hub, "org/code", "v1")


def test_main_is_the_default_and_moves(hub: Hub, family: Family, tmp_path: Path) -> None:
    arguments = ("check", "--seed", str(family.seed), "--expert", "code=org/code", "--json")
    (tmp_path / "home").mkdir()
    done = btx(hub, tmp_path / "home", *arguments)
    assert json.loads(done.stdout)["sources"][1] == {
        "name": "code",
        "model": "org/code",
        "revision": commit_of(hub, "org/code", "main"),
    }


@pytest.fixture
def other(hub: Hub, family: Family, tmp_path: Path) -> Iterator[Any]:
    """Adds a repository for one test: other("org/x", folder)."""
    names: list[str] = []

    def add(repo_id: str, folder: Path = family.code, **values: Any) -> str:
        names.append(repo_id)
        (tmp_path / "home").mkdir(exist_ok=True)
        return hub.add(repo_id, folder, **values)

    yield add
    hub.heal()
    for name in names:
        shutil.rmtree(hub.root / name)


def checked(hub: Hub, family: Family, tmp_path: Path, reference: str, **environment: str) -> Any:
    (tmp_path / "home").mkdir(exist_ok=True)
    arguments = (
        "check",
        "--seed",
        str(family.seed),
        "--expert",
        f"x={reference}",
        "--json",
        "--num-experts-per-tok",
        "1",
    )
    return btx(hub, tmp_path / "home", *arguments, **environment)


def error_of(done: subprocess.CompletedProcess[str], retried: bool = False) -> str:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    if retried:  # of which huggingface_hub tells in lines of its own
        lines = [line for line in lines if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert json.loads(done.stdout)["problems"] == [lines[0].removeprefix("error: ")]
    return lines[0]


def downloaded(hub: Hub, repo_id: str) -> set[str]:
    lines = hub.requests(lambda line: line.startswith(f"GET /{repo_id}/resolve/"))
    return {line.split()[1].split("/", 5)[5] for line in lines}


def test_bin_where_there_are_no_safetensors(hub: Hub, family: Family, other: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    shutil.copytree(family.code, folder)
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    other("org/bin", folder)
    done = checked(hub, family, tmp_path, "org/bin", level="torch")
    assert (done.returncode, done.stderr) == (0, "")
    assert "pytorch_model.bin" in downloaded(hub, "org/bin")


def test_sharded_safetensors_and_not_the_bin_beside_them(hub: Hub, family: Family, other: Any, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(family.math, folder)
    (folder / "pytorch_model.bin").write_bytes(b"not for a merge")
    shards = {f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)}
    for shard in shards:
        (folder / shard).write_bytes(b"not for a merge")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(shards, "x")}))
    other("org/both", folder)
    done = checked(hub, family, tmp_path, "org/both")
    assert (done.returncode, done.stderr) == (0, "")
    assert not [name for name in downloaded(hub, "org/both") if name.endswith(".bin")]


def test_an_index_cannot_ask_for_everything(hub: Hub, family: Family, other: Any, tmp_path: Path) -> None:
    """Its file names become patterns of what to download."""
    folder = tmp_path / "greedy"
    shutil.copytree(family.math, folder)
    (folder / "evil.py").write_text("raise SystemExit")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"a": "*", "b": "../*", "c": "[e]vil.py", "d": "evil?py"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    other("org/greedy", folder)
    done = checked(hub, family, tmp_path, "org/greedy")
    assert done.returncode == 2
    assert "evil.py" not in downloaded(hub, "org/greedy")


def test_an_adapter_and_its_base(hub: Hub, family: Family, other: Any, tmp_path: Path) -> None:
    """The base is another repository, at the revision that the adapter names."""
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(family.code),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
    )
    model.save_pretrained(tmp_path / "lora")
    (tmp_path / "lora/optimizer.pt").write_bytes(b"not for a merge")
    edit_json(tmp_path / "lora/adapter_config.json", base_model_name_or_path="org/code", revision="v1")
    commit = other("org/lora", tmp_path / "lora")
    done = checked(hub, family, tmp_path, "org/lora")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sources"][1] == {"name": "x", "model": "org/lora", "revision": commit}
    needed = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert downloaded(hub, "org/lora") == needed
    asked = hub.requests(
        lambda line: f"/org/code/resolve/{commit_of(hub, 'org/code', 'v1')}/model.safetensors" in line
    )
    assert asked


# What the Hub refuses


def test_a_gated_repository(hub: Hub, family: Family, other: Any, tmp_path: Path) -> None:
    other("org/gated", gated="manual")
    assert error_of(checked(hub, family, tmp_path, "org/gated")) == (
        "error: x: org/gated: the repository is gated and this token has no access; expected a repository that can be "
        "read. Ask for access on its page on the Hub, then run `hf auth login`."
    )


@pytest.mark.parametrize("reference", ["org/nowhere", "org/nowhere@v2", "nobody/nothing"])
def test_a_missing_repository(reference: str, hub: Hub, family: Family, tmp_path: Path) -> None:
    assert error_of(checked(hub, family, tmp_path, reference)) == (
        f"error: x: {reference}: no such folder here and no such repository on the Hub; expected a repository that "
        "can be read. Check the name (a folder is written ./name); for a private one run `hf auth login`."
    )


@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_a_missing_revision(revision: str, hub: Hub, family: Family, tmp_path: Path) -> None:
    assert error_of(checked(hub, family, tmp_path, f"org/code@{revision}")) == (
        f"error: x: org/code@{revision}: the repository has no such revision; expected a repository that can be read. "
        "Check what stands after the @."
    )


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_an_unreachable_hub(environment: dict[str, str], hub: Hub, family: Family, tmp_path: Path) -> None:
    assert error_of(checked(hub, family, tmp_path, "org/code", **environment)) == (
        "error: x: org/code: not a folder, not in the Hub's cache, and the Hub cannot be reached; expected a "
        "repository that can be read. Go online (unset HF_HUB_OFFLINE), or give a folder."
    )


def test_after_a_download_that_broke_off_only_the_rest_is_fetched(
    hub: Hub, family: Family, other: Any, tmp_path: Path
) -> None:
    other("org/flaky")
    hub.fail("GET .*/model.safetensors", "cut")
    line = error_of(checked(hub, family, tmp_path, "org/flaky"), retried=True)
    assert line.startswith("error: x: org/flaky: the download failed (")
    assert line.endswith("Run the same command again: finished files are kept.")
    hub.heal()
    before = len(hub.requests())
    done = checked(hub, family, tmp_path, "org/flaky")
    assert (done.returncode, done.stderr) == (0, "")
    again = hub.requests()[before:]
    assert [line.split("/")[-1] for line in again if line.startswith("GET /org/flaky/resolve")] == [
        "model.safetensors 200"
    ]


def test_a_file_that_the_hub_withholds(hub: Hub, family: Family, other: Any, tmp_path: Path) -> None:
    other("org/blocked")
    hub.fail("/model.safetensors", "403")
    line = error_of(checked(hub, family, tmp_path, "org/blocked"))
    assert line.startswith("error: x: org/blocked: the download failed (")
    assert "403" in line


def test_a_repository_without_weights(hub: Hub, family: Family, other: Any, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    shutil.copytree(family.code, folder)
    (folder / "model.safetensors").unlink()
    other("org/empty", folder)
    line = error_of(checked(hub, family, tmp_path, "org/empty"))
    assert ": no weights; expected model.safetensors or pytorch_model.bin, or shards with their index" in line


def test_problems_of_several_repositories_in_one_report(hub: Hub, family: Family, other: Any, tmp_path: Path) -> None:
    other("org/gated", gated="manual")
    experts = [f"--expert={name}={model}" for name, model in (("a", "org/gated"), ("b", "org/nowhere"), ("c", "./no"))]
    done = btx(hub, tmp_path / "home", "merge", "--seed", str(family.seed), *experts, "-o", str(tmp_path / "out"))
    assert done.returncode == 2
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == ["a", "b", "c"]
    assert not (tmp_path / "out").exists()


def test_a_published_model_is_a_recipe(merged: Path, hub: Hub, other: Any, tmp_path: Path) -> None:
    """By its id: its recipe is fetched, not its weights; the sources by the commits that it names."""
    other("org/merged", merged / "out")
    done = btx(hub, merged / "home", "merge", "--recipe", "org/merged", "-o", str(tmp_path / "again"), "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert files_of(tmp_path / "again") == files_of(merged / "out")
    assert "model.safetensors" not in downloaded(hub, "org/merged")
    done = btx(hub, merged / "home", "check", "--recipe", "org/nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe: org/nothing: no such folder here and no such repository on the Hub")


def test_an_expert_from_the_hub_joins_a_model_from_the_hub(
    merged: Path, hub: Hub, family: Family, other: Any, tmp_path: Path
) -> None:
    """Its sources are fetched too, so that the shared weights become those of a merge with the new one."""
    other("org/merged", merged / "out")
    bio = other("org/bio", grow(family.seed, tmp_path / "bio", random_seed=7))
    words = ("edit", "org/merged", "--add", "bio=org/bio@main", "--drop", "code", "-o", str(tmp_path / "out"))
    done = btx(hub, merged / "home", *words)
    assert done.returncode == 0, done.stderr
    assert "shared   updated: as if merged with the new set" in done.stdout
    recipe = yaml.safe_load((tmp_path / "out/btx_recipe.yaml").read_text())
    assert recipe["experts"]["bio"]["model"] == f"org/bio@{bio}"
    sources = ("--seed", "org/seed", "--expert", "math=org/math", "--expert", "bio=org/bio")
    btx(hub, merged / "home", "merge", *sources, "-o", str(tmp_path / "fresh"))
    ours, fresh = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "fresh")
    assert all(torch.equal(ours[name], fresh[name]) for name in fresh if not name.endswith("mlp.gate.weight"))
    metadata = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
    assert metadata["base_model"] == ["org/seed", "org/math", "org/bio"]
    assert (tmp_path / "out/modeling_btx.py").exists()  # which the Hub was not asked for
