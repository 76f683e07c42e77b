"""Every recipe and script in examples/ runs: its models replaced by tiny ones, all else as it lies there."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from btx_merge import MergeRecipe, export, merge
from btx_merge.cli.app import app
from tests.support import warm
from tests.support.common import (
    assert_complete,
    assert_rounded_once,
    grow,
    load_float32,
    logits_of,
    save_seed,
    tensors_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks for it

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RECIPES = sorted(file.name for file in EXAMPLES.glob("*.yaml"))


def save_adapter(base: Path, folder: Path, random_seed: int) -> Path:
    """A LoRA on attention and feed-forward blocks, with weights that are not zero."""
    torch.manual_seed(random_seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.fixture
def merged(request, tmp_path):
    """An example's recipe as it was run, and the folder that it gave."""
    values = yaml.safe_load((EXAMPLES / request.param).read_text())
    tiny: dict[str, Path] = {}

    def stand_in(reference: str, base: str | None = None) -> str:
        if reference not in tiny:
            folder, number = tmp_path / "models" / re.sub(r"\W", "-", reference), len(tiny)
            if not tiny:
                tiny[reference] = save_seed(folder, dtype=torch.bfloat16)
            elif reference.endswith("-lora"):
                tiny[reference] = save_adapter(Path(base or tiny[values["seed"]]), folder, number)
            else:
                tiny[reference] = grow(tiny[values["seed"]], folder, random_seed=number)
        return str(tiny[reference])

    recipe = {**values, "seed": stand_in(values["seed"]), "experts": {}}
    for name, spec in values["experts"].items():
        if isinstance(spec, str):
            recipe["experts"][name] = stand_in(spec)
            continue
        base = {"base": stand_in(spec["base"])} if "base" in spec else {}
        recipe["experts"][name] = {**spec, "model": stand_in(spec["model"], base.get("base")), **base}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    arguments = ["merge", "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return recipe, tmp_path / "out"


def test_the_examples():
    assert RECIPES == ["full-finetunes.yaml", "lora-adapters.yaml", "sparse-upcycling.yaml", "ties.yaml"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_says_how_to_run_it(name):
    recipe = MergeRecipe.from_yaml(EXAMPLES / name)
    assert recipe.seed == "meta-llama/Llama-3.2-1B"
    text = (EXAMPLES / name).read_text()
    assert f"#   btx merge --recipe examples/{name} -o " in text


@pytest.mark.parametrize("merged", RECIPES, indirect=True)
def test_a_recipe_runs(merged):
    recipe, out = merged
    assert_complete(out)
    config = load_float32(out).config
    assert config.expert_names == ["seed", *recipe["experts"]]
    assert config.num_experts_per_tok == recipe.get("num_experts_per_tok", 2)
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {torch.bfloat16}
    experts = tensors_of(out)["model.layers.0.mlp.experts.down_proj"]
    same = [torch.equal(experts[0], expert) for expert in experts[1:]]
    assert same == [spec == recipe["seed"] for spec in recipe["experts"].values()]


@pytest.mark.parametrize("merged", ["sparse-upcycling.yaml"], indirect=True)
def test_an_upcycled_model_computes_what_its_checkpoint_computes(merged):
    recipe, out = merged
    ours, seeds = (logits_of(load_float32(Path(folder))) for folder in (out, recipe["seed"]))
    torch.testing.assert_close(ours, seeds, atol=1e-5, rtol=0)  # float32 sums in another order


@pytest.mark.parametrize("merged", ["lora-adapters.yaml"], indirect=True)
def test_an_adapter_s_expert_is_its_merged_feed_forward_block(merged):
    """What merge_and_unload gives in float32, rounded once to bf16."""
    recipe, out = merged
    merged_tensors = tensors_of(out)
    for number, spec in enumerate(recipe["experts"].values(), 1):
        spec = spec if isinstance(spec, dict) else {"model": spec, "base": recipe["seed"]}
        base = LlamaForCausalLM.from_pretrained(spec["base"], dtype=torch.float32)
        own = PeftModel.from_pretrained(base, spec["model"]).merge_and_unload().state_dict()
        for layer in (0, 1):
            expected = own[f"model.layers.{layer}.mlp.down_proj.weight"].double()
            ours = merged_tensors[f"model.layers.{layer}.mlp.experts.down_proj"][number]
            assert_rounded_once(ours, expected, magnitude=expected.abs().max())


SCRIPTS = {"fit.py", "finetune.py", "lora.py", "merge_and_generate.py", "serve.py"}


@pytest.fixture(scope="module")
def demo(family, tmp_path_factory):
    """Return a folder with `demo/` as `make demo` leaves it, of tiny models and their words."""
    root = tmp_path_factory.mktemp("scripts") / "demo"
    sources = {"seed": family.seed, "code": family.code, "math": family.math, "english": family.math}
    for name, source in sources.items():
        shutil.copytree(source, root / name)
    (root / "texts").mkdir()
    row = json.dumps({"text": " ".join(f"w{7 * word % 120}" for word in range(50))})
    for name in ("code", "math", "english"):
        (root / f"texts/{name}.jsonl").write_text(20 * f"{row}\n")
    experts = {name: str(root / name) for name in ("code", "english", "math")}
    merge(MergeRecipe(str(root / "seed"), experts), root / "btx")
    shutil.copytree(root / "btx", root / "fitted")
    export(str(root / "fitted"), root / "mixtral")
    return root


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_runs_and_is_short(name, demo, monkeypatch, capsys):
    monkeypatch.chdir(demo.parent)
    script = EXAMPLES / name
    assert f"python examples/{name}\n" in script.read_text()
    assert len(script.read_text().splitlines()) <= 36
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out


def test_what_the_scripts_write(demo, monkeypatch):
    """A merge, a fit and a finetuning are whole models; serve.py knows nothing of this package."""
    monkeypatch.chdir(demo.parent)
    for name, output in (("merge_and_generate.py", "my-btx"), ("fit.py", "my-fitted"), ("finetune.py", "my-trained")):
        if not (demo / output).exists():  # where this test runs alone
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert_complete(demo / output)
    assert "btx_merge" not in (EXAMPLES / "serve.py").read_text()


@pytest.mark.parametrize("script", ["branches.sh", "branches.slurm"])
def test_branches_of_all_texts_in_a_folder(script, texts, tmp_path):
    """The loop does all; of the array job each task one. What is there already is passed over."""
    seed, folder, out = save_seed(tmp_path / "seed"), tmp_path / "texts", tmp_path / "out of it"
    folder.mkdir()
    for name, text in texts.items():
        shutil.copy(text, folder / f"{name}.jsonl")
    flags = ["--train=ff", "--max-steps=2", "--max-length=32", "--use-cpu", "--report-to=none", "--save-steps=1"]
    command = ["sh", str(EXAMPLES / script), str(seed), str(folder), str(out), *flags]
    warm.command_in(tmp_path, "package")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = [
        subprocess.run(command, env={**environment, "SLURM_ARRAY_TASK_ID": task}, capture_output=True, text=True)
        for task in (("0", "1", "0") if script.endswith("slurm") else ("", ""))
    ]
    assert [run.returncode for run in done] == [0] * len(done), done
    assert [run.stdout.count("written") for run in done] == ([1, 1, 0] if script.endswith("slurm") else [2, 0])
    assert sorted(path.name for path in out.iterdir()) == ["code", "math"]
    for name in texts:
        assert_complete(out / name)
    if script.endswith("sh"):
        assert done[0].stdout.endswith(
            f"btx merge --seed {seed} --expert code={out}/code --expert math={out}/math -o {out}/merged\n"
        )
