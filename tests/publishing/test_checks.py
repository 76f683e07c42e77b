"""What keeps a folder from being published, and what must not: no server here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from btx_merge import MergeRecipe, merge
from btx_merge.checkpoints.layout import INDEX_FILE
from btx_merge.publishing.card import card_problems
from btx_merge.publishing.checks import Publishable, examine
from btx_merge.publishing.kinds import BTX
from btx_merge.publishing.private_text import private_text
from tests.support.common import edit_json, files_of, grow, problems_of, save_seed, tiny_tokenizer

TOKEN = "hf_" + "aB3" * 12


@pytest.fixture
def model(merged: Path, tmp_path: Path) -> Path:
    """A merge in several files that a test may spoil."""
    shutil.copytree(merged, tmp_path / "model")
    return tmp_path / "model"


refused = partial(problems_of, examine)


def published(folder: Path) -> Publishable:
    before = files_of(folder)
    checked = examine(folder)
    assert files_of(folder) == before
    return checked


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


# Whole and loadable


@pytest.mark.usefixtures("loaded_here")  # test_push has one for which another process loads the model
def test_a_merge_as_it_is(model: Path) -> None:
    checked = published(model)
    assert set(checked.files) == set(files_of(model))
    assert checked.files[: len(shards(model))] == tuple(file.name for file in shards(model))
    assert [warning.where for warning in checked.warnings] == [
        "README.md: base_model",
        "README.md: license",
        "README.md: language",
    ]


@pytest.mark.usefixtures("loaded_here")
def test_what_save_pretrained_writes_and_a_card(tmp_path: Path) -> None:
    """In one file, with a head tied to the embedding, whose tensor is not stored."""
    seed = save_seed(tmp_path / "seed", tie_word_embeddings=True)
    merge(MergeRecipe(str(seed), {"code": str(grow(seed, tmp_path / "code"))}), tmp_path / "merged")
    saved = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged").save_pretrained(saved)
    tiny_tokenizer().save_pretrained(saved)
    shutil.copy(tmp_path / "merged/README.md", saved)
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")
    assert "model.safetensors" in published(saved).files
    change_tensors(saved / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": torch.zeros(1)}))
    (line,) = refused(saved)
    assert line.startswith("model: weights: hold lm_head.weight, which a model of this config does not have")


@pytest.mark.usefixtures("loaded_here")
def test_a_head_for_classification(merged: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    import btx_merge  # noqa: F401

    AutoModelForSequenceClassification.from_pretrained(merged).save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    card = (merged / "README.md").read_text()
    (tmp_path / "saved/README.md").write_text(card)
    (line,) = refused(tmp_path / "saved")
    assert line == "model: README.md: pipeline_tag: 'text-generation'; expected text-classification"
    (tmp_path / "saved/README.md").write_text(card.replace("text-generation", "text-classification"))
    published(tmp_path / "saved")


def test_no_folder_and_no_merged_model(tmp_path: Path, family: Any) -> None:
    (line,) = refused(tmp_path / "x")
    assert line.startswith(f"model: {tmp_path / 'x'}: no such folder; expected a folder that btx merge, fit, train")
    (line,) = refused(family.seed)
    assert line.startswith("model: config.json: model_type: 'llama'; expected 'btx', or what btx export, extract or")
    (line,) = refused(tmp_path)
    assert line.startswith("model: config.json: missing")
    (tmp_path / "adapter_config.json").write_text("{}")
    (line,) = refused(tmp_path)
    assert line.startswith("model: adapter_config.json: 'adapter'; expected 'btx', or what btx export, extract or")


@pytest.mark.usefixtures("loaded_here")
def test_what_is_missing(model: Path) -> None:
    (model / "routing_btx.py").unlink()
    (model / "tokenizer.json").unlink()
    (model / "README.md").unlink()
    shards(model)[1].unlink()
    assert [line.split(";")[0] for line in refused(model)] == [
        f"model: {shards(model)[0].name.replace('00001', '00002')}: missing",
        "model: routing_btx.py: missing",
        "model: tokenizer.json: missing",
        "model: README.md: missing",
    ]


@pytest.mark.usefixtures("loaded_here")
def test_no_weights_and_both_kinds(model: Path) -> None:
    shutil.copy(shards(model)[0], model / "model.safetensors")
    lines = refused(model)
    assert [line.split(": ")[1] for line in lines] == [INDEX_FILE, "model.safetensors"]
    for file in model.glob("*.safetensors"):
        file.unlink()
    (model / INDEX_FILE).unlink()
    (line,) = refused(model)
    assert line.startswith("model: model: no weights; expected model.safetensors, or shards with")


@pytest.mark.usefixtures("loaded_here")
def test_a_truncated_shard(model: Path) -> None:
    content = shards(model)[0].read_bytes()
    shards(model)[0].write_bytes(content[:-10])
    (line,) = refused(model)
    assert line == (
        f"model: {shards(model)[0].name}: truncated: {len(content) - 10:,} bytes; expected {len(content):,}. "
        "Download or copy the file again."
    )


def change_tensors(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.usefixtures("loaded_here")
def test_tensors_against_the_config(model: Path) -> None:
    index = json.loads((model / INDEX_FILE).read_text())
    norm = "model.layers.0.input_layernorm.weight"
    file = model / index["weight_map"].pop(norm)
    index["weight_map"]["model.extra.weight"] = file.name

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[norm]
        tensors["model.extra.weight"] = torch.zeros(2)

    change_tensors(file, change)
    (model / INDEX_FILE).write_text(json.dumps(index))
    edit_json(model / "config.json", intermediate_size=97)
    lines = refused(model)
    assert lines[0].startswith(f"model: weights: lack {norm}; expected every tensor of the config")
    assert lines[1].startswith("model: weights: hold model.extra.weight, which a model of this config does not have")
    assert "model.layers.0.mlp.experts.down_proj is [3, 64, 96], and 3 more are wrong" in lines[2]
    assert "expected [3, 64, 97] by config.json" in lines[2]
    assert len(lines) == 3


@pytest.mark.usefixtures("loaded_here")
def test_a_tensor_that_the_index_does_not_name(model: Path) -> None:
    change_tensors(shards(model)[0], lambda tensors: tensors.update(hidden=torch.zeros(1)))
    assert refused(model) == [f"model: {INDEX_FILE}: does not name hidden, which the shards hold"]


@pytest.mark.usefixtures("loaded_here")
def test_code_that_does_not_load(model: Path) -> None:
    (model / "experts_btx.py").write_text("raise RuntimeError('not today')\n")
    lines = refused(model)
    assert any("auto_map: AutoModelForCausalLM" in line and "RuntimeError: not today" in line for line in lines)
    assert all(line.startswith("model: config.json: auto_map: Auto") for line in lines)


@pytest.mark.usefixtures("loaded_here")
def test_an_architecture_that_auto_map_does_not_name(model: Path) -> None:
    edit_json(model / "config.json", architectures=["LlamaForCausalLM"])
    (line,) = refused(model)
    assert "architectures: does not load" in line
    assert "'LlamaForCausalLM', which auto_map does not name" in line


def test_the_folders_code_is_what_is_tried_and_gets_no_token(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here btx_merge.modeling is imported, and would do; so would another cache of code on the user's path."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (model.parent / "cache" / "transformers_modules").mkdir(parents=True)
    (model.parent / "cache" / "transformers_modules" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(model.parent / "cache"))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # the working folder is not searched
    spy = "import os, sys\nassert 'HF_TOKEN' not in os.environ and 'btx_merge' not in sys.modules\nprint('loud')\n"
    (model / "modeling_btx.py").write_text(spy + (model / "modeling_btx.py").read_text())
    published(model)


@pytest.mark.usefixtures("loaded_here")
def test_code_without_the_class(model: Path) -> None:
    with (model / "modeling_btx.py").open("a") as code:
        code.write("\nBTXForCausalLM = None\n")
    (line,) = refused(model)
    assert "auto_map: AutoModelForCausalLM: does not load" in line
    assert "TypeError: modeling_btx.BTXForCausalLM is no class" in line


@pytest.mark.usefixtures("loaded_here")
def test_a_tokenizer_that_does_not_load_or_does_not_fit(model: Path) -> None:
    tiny_tokenizer(["one more"]).save_pretrained(model)
    (line,) = refused(model)
    assert "a token has id 128, but the model has 128 rows" in line
    (model / "tokenizer.json").write_text("{")
    (line,) = refused(model)
    assert line.startswith("model: tokenizer: does not load where btx-merge is not installed (")


@pytest.mark.usefixtures("loaded_here")
def test_a_generation_config_that_does_not_load(model: Path) -> None:
    edit_json(model / "generation_config.json", early_stopping="maybe")
    (line,) = refused(model)
    assert line.startswith("model: generation_config.json: does not load where btx-merge is not installed (ValueError")


@pytest.mark.usefixtures("loaded_here")
def test_a_quantised_model(model: Path) -> None:
    edit_json(model / "config.json", quantization_config={"quant_method": "torchao"})
    assert refused(model)[0].startswith("model: config.json: a quantised model; expected plain weights")


# Nothing else


@pytest.mark.usefixtures("loaded_here")
def test_foreign_files_one_by_one(model: Path, tmp_path: Path) -> None:
    for name in ("optimizer.pt", "training_args.bin", "pytorch_model.bin", ".env", "btx_journal.jsonl", "x.py"):
        (model / name).write_text("x")
    (model / "checkpoint-10").mkdir()
    (model / "__pycache__").mkdir()
    (model / "model-00009-of-00009.safetensors").write_bytes(b"x")
    (tmp_path / "elsewhere").write_text("x")
    (model / "LICENSE").symlink_to(tmp_path / "elsewhere")
    lines = refused(model)
    foreign = "a file that is no part of a model. Move it away: only the model is published."
    folder = "a folder that is no part of a model. Move it away: only the model is published."
    assert lines == [
        f"model: .env: {foreign}",
        "model: LICENSE: a link out of the folder; expected a file. Put the file itself in its place.",
        f"model: __pycache__: {folder}",
        f"model: btx_journal.jsonl: {foreign}",
        f"model: checkpoint-10: {folder}",
        "model: model-00009-of-00009.safetensors: weights that are no part of this model. "
        "Move it away: it seems to be left from another save.",
        f"model: optimizer.pt: {foreign}",
        f"model: pytorch_model.bin: {foreign}",
        f"model: training_args.bin: {foreign}",
        f"model: x.py: {foreign}",
    ]


@pytest.mark.usefixtures("loaded_here")
def test_what_is_sent_beside_the_model_and_what_is_passed_over(model: Path) -> None:
    before = set(files_of(model))
    sent = ["LICENSE.txt", "NOTICE", "USE_POLICY.md", "training.png", "routing.jsonl", "chat_template.jinja"]
    sent += [".gitattributes", "additional_chat_templates/tool.jinja"]
    passed_over = [".cache/huggingface/download/x.lock", ".git/config", ".DS_Store"]
    passed_over += ["runs/events.out.tfevents.1.host"]
    for name in sent + passed_over:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("x")
    assert set(published(model).files) == before | set(sent)
    (model / ".cache/torch").mkdir()
    (line,) = refused(model)
    assert line.startswith("model: .cache: a folder")


def test_files_of_an_earlier_model() -> None:
    """Which would change how another one loads, and so go with it."""
    for name in (
        "model.safetensors",
        "model-00002-of-00003.safetensors",
        INDEX_FILE,
        "tokenizer.model",
        "routing_btx.py",
    ):
        assert BTX.has(name)
    for name in ("README.md", "LICENSE", "logo.png", ".gitattributes", "adapter_model.safetensors", "x/config.json"):
        assert not BTX.has(name)


# Nothing private


def scan(folder: Path, name: str, text: str) -> list[str]:
    (folder / name).write_text(text)
    return [f"{problem.where}: {problem.found}" for problem in private_text(folder, [name], {})]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /home/joe/models", "a path of this machine, /home/joe"),
        ("'/Users/jane.doe'", "a path of this machine, /Users/jane.doe"),
        (r'{"a": "C:\\Users\\joe\\x"}', r"a path of this machine, C:\\Users\\joe"),
        ("file:///home/joe", "a path of this machine, /home/joe"),
        ("/root/llama", "a path of this machine, /root/llama"),
        (f"export HF_TOKEN={TOKEN}", "an access token (hf_aB3...)"),
        ("api_org_" + "x" * 34, "an access token (api_org_xxx...)"),
    ],
)
def test_private_text(text: str, found: str, tmp_path: Path) -> None:
    assert scan(tmp_path, "README.md", f"first\n{text}\n") == [f"README.md, line 2: {found}"]


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/home/joe and https://example.org/~x/home/joe",
        "the directory /home, a ratio a/Users/b, /homeless/x, hf_hub, hf_transfer, hf_short1",
        "path = '.'  # this folder",
        "base /data and /tmp and /mnt",
    ],
)
def test_no_false_alarm(text: str, tmp_path: Path) -> None:
    assert scan(tmp_path, "README.md", text) == []


def test_the_models_own_place(tmp_path: Path) -> None:
    folder = tmp_path / "secret project" / "model"
    folder.mkdir(parents=True)
    lines = scan(folder, "btx_recipe.yaml", f"a: {folder}/x\nb: {folder.parent}\nc: {folder}-other\n")
    assert lines == [
        f"btx_recipe.yaml, line 1: a path of this machine, {folder}",
        f"btx_recipe.yaml, line 2: a path of this machine, {folder.parent}",
        f"btx_recipe.yaml, line 3: a path of this machine, {folder.parent}",
    ]


def test_a_tokenizer_may_know_paths_but_no_secret(tmp_path: Path) -> None:
    template = json.dumps({"chat_template": "cd /home/user/x", "name_or_path": "x"}, indent=2)
    assert scan(tmp_path, "tokenizer_config.json", template) == []
    assert scan(tmp_path, "chat_template.jinja", "cd /home/user/x") == []
    assert scan(tmp_path, "tokenizer.json", '{"content": "/home/user"}') == []
    assert len(scan(tmp_path, "tokenizer.json", TOKEN)) == 1
    template = json.dumps({"chat_template": "x", "name_or_path": "/home/joe/llama"}, indent=2)
    assert scan(tmp_path, "tokenizer_config.json", template) == [
        "tokenizer_config.json, line 3: a path of this machine, /home/joe"
    ]


@pytest.mark.usefixtures("loaded_here")
def test_private_text_in_a_model(model: Path) -> None:
    edit_json(model / "generation_config.json", _from=str(model))
    with (model / "README.md").open("a") as card:
        card.write(f"\nMade with {TOKEN}.\n")
    lines = refused(model)
    assert [line.split(",")[0] for line in lines] == ["model: README.md", "model: generation_config.json"]
    assert TOKEN not in "\n".join(lines)


# The card

GOOD = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["btx"],
    "base_model": ["org/seed", "org/code"],
    "base_model_relation": "merge",
    "license": "apache-2.0",
    "language": ["en", "de"],
}


def card(**changes: Any) -> str:
    values = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    return f"---\n{yaml.safe_dump(values)}---\n# A model\n"


def test_a_good_card() -> None:
    assert card_problems(card(), "text-generation") == ([], [])
    assert card_problems(card().replace("\n", "\r\n"), "text-generation") == ([], [])
    for changes in ({"language": "code"}, {"language": ["pt-BR"]}, {"license": ["mit", "cc-by-4.0"]}):
        assert card_problems(card(**changes), "text-generation") == ([], [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"library_name": "keras"}, "library_name: 'keras'; expected transformers"),
        ({"pipeline_tag": None}, "pipeline_tag: missing; expected text-generation"),
        ({"tags": ["merge"]}, "tags: ['merge']; expected a list with btx"),
        ({"base_model": "org/seed"}, "base_model: 'org/seed'; expected a list of Hub ids, org/name"),
        ({"base_model": ["./seed"]}, "base_model: ['./seed']; expected a list of Hub ids, org/name"),
        ({"base_model": None}, "base_model: missing; expected a list of Hub ids, org/name"),
        ({"base_model_relation": None}, "base_model_relation: missing; expected merge or finetune"),
        ({"base_model_relation": "adapter"}, "base_model_relation: 'adapter'; expected merge or finetune"),
        ({"license": "My licence"}, "license: 'My licence'; expected an identifier such as apache-2.0 or llama3.2"),
        ({"license": 2.0}, "license: 2.0; expected an identifier such as apache-2.0 or llama3.2"),
        ({"language": ["English"]}, "language: ['English']; expected codes of two or three letters"),
        ({"language": False}, "language: False; expected codes of two or three letters"),
    ],
)
def test_a_bad_card(changes: dict[str, Any], said: str) -> None:
    (problem,), warnings = card_problems(card(**changes), "text-generation")
    assert str(problem).startswith(f"model: README.md: {said}")
    assert warnings == []


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"base_model": None, "base_model_relation": None}, "README.md: base_model"),
        ({"license": None}, "README.md: license"),
        ({"license": "other"}, "README.md: license"),
        ({"language": None}, "README.md: language"),
    ],
)
def test_what_only_the_author_knows_is_a_warning(changes: dict[str, Any], where: str) -> None:
    problems, (warning,) = card_problems(card(**changes), "text-generation")
    assert problems == []
    assert warning.where == where
    assert "write" in warning.remedy.lower()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# A model\n", "no metadata"),
        ("---\na: [1\n---\n", "its metadata is no YAML"),
        ("---\na: 2024-02-31\n---\n", "its metadata is no YAML"),
        ("---\n- a\n---\n", "its metadata is no mapping"),
    ],
)
def test_no_card_at_all(text: str, said: str) -> None:
    (problem,), _ = card_problems(text, "text-generation")
    assert problem.found.startswith(said)


@pytest.mark.usefixtures("loaded_here")
def test_a_card_that_is_no_text(model: Path) -> None:
    (model / "README.md").write_bytes("# Größe".encode("latin-1"))
    (line,) = refused(model)
    assert line.startswith("model: README.md: is no UTF-8")


def test_the_checks_import_no_torch(merged: Path) -> None:
    """The model is built elsewhere; here a merge's files are read."""
    code = """
import sys, pathlib
from btx_merge.publishing import checks as publish_checks
publish_checks._load = lambda folder: {"problems": [], "tensors": None}
publish_checks.examine(pathlib.Path(sys.argv[1]))"""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint('torch' in sys.modules)", str(merged)], capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr
