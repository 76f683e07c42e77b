"""`info`: what a merged model says of itself, and what is said of other folders."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from btx_merge import (
    EditRecipe,
    FitRecipe,
    InputError,
    MergeRecipe,
    edit,
    export,
    extract,
    fit,
    info,
    merge,
)
from btx_merge.measuring.sources import open_sources
from btx_merge.model.info import next_commands
from btx_merge.model.merged import open_merged
from btx_merge.sources.locate import locate
from tests.cli.test_app import HEAVY, btx, errors_of, imported_by
from tests.conftest import Family
from tests.support.common import edit_json, files_of, problems_of
from tests.support.hub_server import Hub


def test_a_fresh_merge(family: Family, tmp_path: Path) -> None:
    """Sizes are those that transformers counts."""
    merge(MergeRecipe(str(family.seed), family.experts, combine="seed"), tmp_path / "out")
    found = info(str(tmp_path / "out"))
    assert [(expert.number, expert.name, expert.model) for expert in found.experts] == [
        (0, "seed", "llama-seed"),
        (1, "code", "llama-code"),
        (2, "math", "llama-math"),
    ]
    assert (found.expert_mode, found.combine, found.routers) == ("whole", "seed", "random")
    assert (found.router_type, found.experts_per_token, found.dtype, found.tokenizer) == ("top_k", 2, "float32", True)
    assert found.history == ("merged: shared weights seed, routers random",)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.parameters == model.num_parameters()
    experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    assert found.active_parameters == model.num_parameters() - experts // 3
    assert found.nbytes == 4 * found.parameters
    assert found.next == (
        f"btx fit {tmp_path / 'out'} --domain-text code=TEXT --domain-text math=TEXT -o out-fitted",
        f"btx train {tmp_path / 'out'} --data code=TEXT --data math=TEXT --train routers -o out-trained",
    )
    assert found.disk_bytes == sum(map(len, files_of(tmp_path / "out").values()))


@pytest.mark.slow
def test_the_next_command_runs(merged: Path, texts: dict[str, str], tmp_path: Path) -> None:
    """As it stands there, with the texts filled in."""
    (line,) = [line for line in info(str(merged)).next if line.startswith("btx fit ")]
    for text in texts.values():
        line = line.replace("TEXT", text, 1)
    done = btx(*shlex.split(line)[1:], "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr  # which may hold what torchao says at its import
    assert not re.search("^(warning|error):", done.stderr, re.MULTILINE)
    found = info(str(tmp_path / "merged-fitted"))
    assert (found.routers, found.history[-1]) == ("fitted", "routers fitted: ridge")
    assert [line.split()[1] for line in found.next] == ["export", "push", "eval", "routing"]
    (line,) = [line for line in found.next if line.startswith("btx routing ")]
    for text in texts.values():
        line = line.replace("TEXT", text, 1)
    done = btx(*shlex.split(line)[1:], "-q", cwd=tmp_path, level="package")
    assert done.returncode == 0, done.stderr
    assert not re.search("^(warning|error):", done.stderr, re.MULTILINE)
    assert next_commands(tmp_path / "merged-fitted-routing") == (
        f"python -m webbrowser {(tmp_path / 'merged-fitted-routing/report.html').as_uri()}",
    )


def test_the_next_command_says_which_sources_lie_elsewhere(family: Family, tmp_path: Path) -> None:
    """`btx eval` finds a folder by its name beside the model; as the command stands, it finds all others, too."""
    (tmp_path / "models").mkdir()
    shutil.copytree(family.code, tmp_path / "models" / family.code.name)
    merge(MergeRecipe(str(family.seed), family.experts), tmp_path / "models/merged")
    lines = {"code": ["w1 w2"], "math": ["w70 w71"], "seed": ["w3"]}
    fit(FitRecipe(str(tmp_path / "models/merged"), "prompts", prompts=lines), tmp_path / "models/fitted")

    def asked() -> list[str]:
        (line,) = [line for line in info(str(tmp_path / "models/fitted")).next if line.startswith("btx eval ")]
        return line.split()[3:]

    texts = ["--data", "code=TEXT", "--data", "math=TEXT"]
    assert asked() == [*texts, "--source", "seed=MODEL", "--source", "math=MODEL"]
    found = open_merged(locate("model", str(tmp_path / "models/fitted")))
    moved = {"seed": str(family.seed), "math": str(family.math)}
    sources, problems = open_sources(found, moved, scratch=lambda: tmp_path)
    assert ([*sources], problems) == (["seed", "code", "math"], [])
    for folder in (family.seed, family.math):
        shutil.copytree(folder, tmp_path / "models" / folder.name)
    assert asked() == texts
    (tmp_path / "models/fitted/btx_recipe.yaml").unlink()
    assert asked()[-1] == "--no-sources"


def test_what_was_done_since(family: Family, merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "merged")
    lines = {"code": ["w1 w2"], "math": ["w70 w71"], "seed": ["w3"]}
    fit(FitRecipe(str(tmp_path / "merged"), "prompts", prompts=lines), tmp_path / "fitted")
    changed = EditRecipe(str(tmp_path / "fitted"), drop=("code",), rename={"math": "maths"}, shared="keep")
    edit(changed, tmp_path / "edited")
    found = info(str(tmp_path / "edited"))
    assert [expert.name for expert in found.experts] == ["seed", "maths"]
    assert found.experts[1].model == "llama-math"
    assert found.history[1:] == (
        "edited: drop code, rename math to maths; shared weights kept",
        "routers fitted: prompts",
    )
    assert (found.untrained, found.next[0].split()[:2]) == ((), ["btx", "export"])
    added = EditRecipe(str(tmp_path / "edited"), add={"new": str(family.code)}, shared="keep")
    edit(added, tmp_path / "wider")
    found = info(str(tmp_path / "wider"))
    assert (found.routers, found.untrained, found.next[0].split()[:2]) == ("fitted", ("new",), ["btx", "fit"])
    assert found.history[2] == "edited: add new, the router row of new random; shared weights kept"
    recipe = tmp_path / "edited/btx_recipe.yaml"
    trained = {"training": [{"train": "routers", "steps": 7, "tokens": 70, "data": [{"name": "code"}]}]}
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **trained}))
    found = info(str(tmp_path / "edited"))
    assert (found.routers, found.history[-1]) == ("trained", "trained: routers, 7 steps, 70 tokens of code")
    odd = {"edits": [{"rename": "x", "add": 3, "router_rows": ["y"], "trainings_before": "z"}], "experts": [1]}
    recipe.write_text(yaml.safe_dump(odd))
    assert info(str(tmp_path / "edited")).history == ("edited: add 3, rename x; shared weights None",)
    recipe.unlink()
    assert (info(str(tmp_path / "edited")).routers, info(str(tmp_path / "edited")).history) == ("unknown", ())


def test_split_and_blended_experts(family: Family, tmp_path: Path) -> None:
    """A split source is named for each of its experts; a blended expert has none."""
    for mode in ("split", "blend"):
        merge(MergeRecipe(str(family.seed), {"code": str(family.code)}, expert_mode=mode), tmp_path / mode)
    split, blend = info(str(tmp_path / "split")), info(str(tmp_path / "blend"))
    assert [expert.model for expert in split.experts] == ["llama-seed", "llama-seed", "llama-code", "llama-code"]
    assert {expert.model for expert in blend.experts} == {None}
    assert [line.split()[1] for line in split.next] == ["fit", "train"]
    (line,) = blend.next  # what has no domain cannot be fitted; the texts are still those of the domains
    assert line.startswith("btx train ")
    assert "--data code=TEXT --train routers" in line


def test_the_command(merged: Path, tmp_path: Path) -> None:
    done = btx("info", merged, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json.loads(json.dumps(info(str(merged)).to_dict()))
    shutil.copytree(merged, tmp_path / "merged")
    recipe = tmp_path / "merged/btx_recipe.yaml"
    values = yaml.safe_load(recipe.read_text())
    values["experts"]["code"]["model"] = "[red]\x1b[2J:cat:"
    recipe.write_text(yaml.safe_dump(values))
    done = btx("info", tmp_path / "merged", COLUMNS="200")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    for text in (r"[red]\x1b[2J:cat:", "2 of 3 experts per token", "next: btx fit ", "llama-math"):
        assert text in done.stdout
    loaded = imported_by(f"import btx_merge\nbtx_merge.info({str(merged)!r})", tmp_path)
    assert not loaded & (HEAVY - {"huggingface_hub"})


def test_a_model_on_the_hub(merged: Path, tmp_path: Path) -> None:
    """Weights are not downloaded, and the figures are those of the folder."""
    server = Hub(tmp_path / "hub")
    try:
        commit = server.add("org/llama-btx", merged)
        done = btx("info", "org/llama-btx", "--json", **server.environment(tmp_path / "home", HF_HUB_OFFLINE="0"))
        assert not [line for line in server.requests() if line.startswith("GET") and ".safetensors " in line]
    finally:
        server.close()
    assert (done.returncode, done.stderr) == (0, "")
    found, local = json.loads(done.stdout), info(str(merged)).to_dict()
    assert found["revision"] == commit
    same = ("experts", "parameters", "active_parameters", "dtype", "nbytes", "routers", "history", "tokenizer")
    assert {key: found[key] for key in same} == {key: json.loads(json.dumps(local[key])) for key in same}


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_a_config_from_the_hub_that_nobody_can_have(key: str, merged: Path, tmp_path: Path) -> None:
    """It would be worked on for ever."""
    folder = tmp_path / f"models--org--name/snapshots/{'0f' * 20}"
    shutil.copytree(merged, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert info(str(folder)).model == str(folder)
    edit_json(folder / "config.json", **{key: 10**12, "expert_names": None})
    with pytest.raises(InputError, match=f"{key}: 1,000,000,000,000; expected at most 10,000"):
        info(str(folder))


def test_a_merged_model_with_something_wrong(merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "merged")
    weights = sorted((tmp_path / "merged").glob("*.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        info(str(tmp_path / "merged"))
    weights.unlink()
    with pytest.raises(InputError, match="model: "):
        info(str(tmp_path / "merged"))


@pytest.fixture(scope="module")
def others(family: Family, merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that are no merged model."""
    root = tmp_path_factory.mktemp("others")
    shutil.copytree(family.seed, root / "dense")
    export(str(merged), root / "exported")
    extract(str(merged), "code", root / "extracted")
    model = LlamaForCausalLM.from_pretrained(family.seed)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(root / "adapter")
    shutil.copytree(root / "adapter", root / "tuned")
    shutil.copy(merged / "btx_recipe.yaml", root / "tuned")
    for name in ("out.btx-partial", "out.btx-training", "gguf", "empty", "bert"):
        (root / name).mkdir()
    (root / "gguf/model.gguf").write_bytes(b"GGUF")
    (root / "bert/config.json").write_text('{"model_type": "bert"}')
    return root


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dense", "'llama', a dense Llama; expected 'btx'. Merge first. Make an expert of it: btx merge --seed SEED"),
        ("extracted", "'llama', an expert that btx extract took out; expected 'btx'. Give the merged model that"),
        ("exported", "'mixtral', a model that btx export wrote for other programs; expected 'btx'. Give the merged"),
        ("adapter", "a PEFT adapter on FAMILY; expected a merged model. Make an expert of it: btx merge --seed SEED"),
        ("tuned", "a PEFT adapter on FAMILY; expected a merged model. It is of a merged model. Merge it into that"),
        ("out.btx-partial", "what an interrupted run has left; expected a merged model. Run the same command again"),
        ("out.btx-training", "an unfinished training; expected a merged model. Run btx train again, with --resume"),
        ("gguf", "a GGUF; expected a merged model. Give the merged model that it was made from"),
        ("empty", "missing; expected a folder saved by save_pretrained"),
        ("bert", "'bert'; expected 'btx'. Merge first: btx merge makes one of Llama models"),
    ],
)
def test_what_another_folder_is(name: str, said: str, others: Path, family: Family) -> None:
    (line,) = errors_of(btx("info", others / name))
    assert said.replace("FAMILY", str(family.seed)) in line
    # the same in every verb that wants a merged model
    assert problems_of(export, str(others / name), others / "never") == [line]


# What each verb tells at its end


def told_next(*arguments: str | Path) -> list[str]:
    """Run a command and return the commands that it names at its end, on stderr."""
    done = btx(*map(str, arguments))
    assert done.returncode == 0, done.stderr
    assert "next: " not in done.stdout
    return [line.removeprefix("next: ") for line in done.stderr.splitlines() if line.startswith("next: ")]


@pytest.mark.slow
def test_each_verb_says_which_comes_next(merged: Path, texts: dict[str, str], tmp_path: Path) -> None:
    """As `btx info` says of the result; a command with --quiet or --json says nothing."""
    given = [word for name, text in texts.items() for word in ("--domain-text", f"{name}={text}")]
    fitted, small = tmp_path / "fitted", tmp_path / "small"
    mixtral, code = tmp_path / "mixtral", tmp_path / "code"
    data = "--data code=TEXT --data math=TEXT"
    lead_on = [
        f"btx export {fitted} fitted-mixtral",
        f"btx push {fitted} ORG/NAME",
        f"btx eval {fitted} {data} --source seed=MODEL --source code=MODEL --source math=MODEL",
        f"btx routing {fitted} {data} -o fitted-routing",
    ]
    assert told_next("fit", merged, *given, "-o", fitted) == lead_on == list(info(str(fitted)).next)
    assert told_next("edit", fitted, "--drop", "code", "--shared", "keep", "-o", small)[0].startswith("btx export ")
    assert told_next("export", fitted, mixtral) == [f"vllm serve {mixtral}", f"btx push {mixtral} ORG/NAME"]
    assert told_next("extract", fitted, "code", "-o", code) == [f"btx push {code} ORG/NAME"]
    for silent in ("--quiet", "--json"):
        assert told_next("extract", fitted, "code", "-o", tmp_path / silent, silent) == []


def test_a_fresh_merge_says_that_its_routers_come_next(family: Family, tmp_path: Path) -> None:
    given = ["--seed", family.seed, "--expert", f"code={family.code}", "-o", tmp_path / "out"]
    assert [line.split()[1] for line in told_next("merge", *given)] == ["fit", "train"]


@pytest.mark.parametrize("name", ['it\'s "my" $model', "-dash", "two\nlines \\ 'quoted' \x1b[2J\u202e\x85", "a" * 200])
def test_what_comes_next_can_be_pasted(family: Family, tmp_path: Path, name: str) -> None:
    """Whatever the folder's name: bash takes the command apart into the words that are meant."""
    given = ["--seed", str(family.seed), "--expert", f"code={family.code}"]
    done = btx("merge", *given, "-o", name, cwd=tmp_path)
    line = next(line for line in done.stderr.splitlines() if line.startswith("next: btx fit "))
    assert line.isprintable()
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line.removeprefix('next: ')}"], capture_output=True, check=True
    )
    model, output = f"./{name}" if name.startswith("-") else name, f"{name}-fitted"
    output = f"./{output}" if output.startswith("-") else output
    expected = ["btx", "fit", model, "--domain-text", "code=TEXT", "-o", output]
    assert words.stdout.decode().split("\0")[:-1] == expected
    shown = btx("info", model, cwd=tmp_path)
    assert line in shown.stdout.splitlines()


def test_a_long_command_is_shown_whole(family: Family, tmp_path: Path) -> None:
    experts = [word for number in range(130) for word in ("--expert", f"the-expert-number-{number}={family.code}")]
    done = btx("merge", "--seed", str(family.seed), *experts, "-o", "out", cwd=tmp_path)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("next: btx fit ")]
    assert len(line) > 4000
    assert line.count("--domain-text") == 130


def test_what_comes_after_an_adapter_and_a_gguf(merged: Path, tmp_path: Path) -> None:
    adapter, file = tmp_path / "adapter", tmp_path / "model.gguf"
    adapter.mkdir()
    file.touch()
    for base, more in (("org/base", ""), (str(merged), " --base-model ORG/BASE")):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        assert next_commands(adapter) == (f"btx push {adapter} ORG/NAME{more}",)
    assert next_commands(file) == (f"llama-server -m {file}",)
