"""`export`: the Mixtral against the model that it was made from, bit by bit; what is refused, what is said."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

import btx_merge
from btx_merge import InputError, MergeInterrupted, MergeRecipe, Options, export, merge
from btx_merge.exporting.mixtral import mixtral_card
from btx_merge.model.merged import open_merged
from btx_merge.sources.locate import Located
from tests.checkpoints.test_staging import ctrl_c_after, partial
from tests.support import warm
from tests.support.common import (
    TINY_CONFIG,
    WITHOUT_BTX_MERGE,
    Told,
    edit_json,
    files_of,
    grow,
    logits_of,
    problems_of,
    raw_bytes,
    save_seed,
    tensors_of,
    tiny_tokenizer,
)

LONG = {"short_factor": [1 + 0.1 * n for n in range(12)], "long_factor": [2 + 0.2 * n for n in range(12)]}
ROPES = {  # of everything that a Llama can have, the spellings that are read in more than one way
    "default": {"rope_type": "default", "rope_theta": 5e3},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
    "yarn in full": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
        **{"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    },
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 5e5},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 32, "rope_theta": 1e4, **LONG},
    "longrope of another factor": {
        **{"rope_type": "longrope", "factor": 3.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
        **LONG,
    },
}
WARNED = {
    "dynamic": "beyond max_position_embeddings vLLM and llama.cpp do not scale",
    "yarn in full": "with mscale and truncate, which llama.cpp reads otherwise or not at all",
    "longrope": "llama.cpp's converter drops its factors; vLLM takes the long ones",
    "longrope of another factor": "llama.cpp's converter drops its factors; vLLM takes the long ones",
}


def load(folder: Path):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def a_merge(folder: Path, seed: Path, **options) -> Path:
    """Of a seed and two experts, with routers that make a difference."""
    experts = {name: str(grow(seed, folder / name, random_seed=n)) for n, name in enumerate(("code", "math"), 1)}
    merge(MergeRecipe(str(seed), experts, router_std=1.0, **options), folder / "merged")
    return folder / "merged"


@torch.no_grad()
def assert_same_bits(merged: Path, exported: Path) -> None:
    """Of every logit: of two long sequences, of short ones, and of a single token, each of which has its own way."""
    ours, theirs = load(merged), load(exported)
    assert type(theirs) is MixtralForCausalLM
    assert ours.dtype == theirs.dtype
    ids = (torch.arange(300).reshape(2, 150) * 37) % 128  # beyond the 128 positions of the config
    for part in (ids, ids[:, :20], ids[:1, :1]):
        assert torch.equal(ours(part).logits, theirs(part).logits)
    assert logits_of(ours).std() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(ROPES))
def test_the_logits_are_the_same_bits(tmp_path, name, dtype):
    """Over every rope type, with heads of another size than hidden_size / heads; every other one tied."""
    tied = list(ROPES).index(name) % 2 == 1
    seed = save_seed(
        tmp_path / "seed", rope_parameters=ROPES[name], head_dim=24, tie_word_embeddings=tied, dtype=dtype
    )
    merged = a_merge(tmp_path, seed)
    report = export(str(merged), tmp_path / "out")
    assert_same_bits(merged, tmp_path / "out")
    untrained, *warnings = [str(warning) for warning in report.warnings]
    assert untrained.startswith("model: routers: have not been trained yet")
    assert len(warnings) == (name in WARNED)
    assert all(WARNED[name] in warning for warning in warnings)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 3},
        {"num_experts_per_tok": 1, "seed_expert": False},
        {"expert_mode": "split", "num_chunks": 3, "num_experts_per_tok": 4},
        {"expert_mode": "blend"},
        {"fold_norms": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_every_kind_of_merge(tmp_path, tied, options):
    merged = a_merge(tmp_path, save_seed(tmp_path / "seed", tie_word_embeddings=tied), **options)
    export(str(merged), tmp_path / "out")
    assert_same_bits(merged, tmp_path / "out")


def test_every_tensor_is_a_range_of_the_models_bytes(merged, tmp_path):
    """The names are a contract: transformers 4, vLLM and llama.cpp's converter know no others."""
    export(str(merged), tmp_path / "out", Options(max_shard_size="100KB"))
    expected = {}
    for name, tensor in tensors_of(merged).items():
        block = name.rpartition(".mlp.")[0] + ".block_sparse_moe."
        if name.endswith("mlp.gate.weight"):
            expected[block + "gate.weight"] = tensor
        elif name.endswith("gate_up_proj"):
            for expert, fused in enumerate(tensor):
                expected[f"{block}experts.{expert}.w1.weight"], expected[f"{block}experts.{expert}.w3.weight"] = (
                    fused.chunk(2)
                )
        elif name.endswith("down_proj"):
            expected |= {f"{block}experts.{expert}.w2.weight": part for expert, part in enumerate(tensor)}
        else:
            expected[name] = tensor
    written = tensors_of(tmp_path / "out")
    assert written.keys() == expected.keys()
    assert all(raw_bytes(written[name]) == raw_bytes(tensor) for name, tensor in expected.items())
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert len(files) > 3
    assert all(file.stat().st_size < 110_000 for file in files)


def test_its_config_and_its_files(tmp_path):
    """Config keys are a contract; nobody is told a path of this machine."""
    merged = a_merge(tmp_path, save_seed(tmp_path / "seed", rope_parameters=ROPES["llama3"], dtype=torch.bfloat16))
    export(str(merged), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **TINY_CONFIG,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "torch_dtype": "bfloat16",
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }
    files = files_of(tmp_path / "out")
    assert files.keys() == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md", "btx_recipe.yaml"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    for name in ("generation_config.json", "tokenizer.json", "btx_recipe.yaml"):
        assert files[name] == (merged / name).read_bytes()
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]


def test_it_loads_where_btx_merge_is_not_installed(merged, tmp_path):
    export(str(merged), tmp_path / "out")
    code = f"{WITHOUT_BTX_MERGE}\nfrom transformers import AutoModelForCausalLM\n"
    code += "print(type(AutoModelForCausalLM.from_pretrained('out')).__name__)"
    done = warm.run([sys.executable, "-c", code], cwd=tmp_path, level="transformers")
    assert done.stdout.split() == ["MixtralForCausalLM"], done.stderr


def test_a_tokenizer_that_transformers_4_knows_too(merged, tmp_path):
    """Version 5 has other names for the same class and the same list."""
    shutil.copytree(merged, tmp_path / "merged")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w5", "w6"]})
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "merged")
    edit_json(
        tmp_path / "merged/tokenizer_config.json", auto_map={"AutoTokenizer": "evil.py"}, name_or_path="/home/me"
    )
    before = json.loads((tmp_path / "merged/tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend"
    assert before["extra_special_tokens"] == ["w5", "w6"]
    export(str(tmp_path / "merged"), tmp_path / "out")
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["w5", "w6"]
    assert not config.keys() & {"extra_special_tokens", "auto_map", "name_or_path"}
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(tokenizer.all_special_tokens) == set(loaded.all_special_tokens)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("w1 w5 w7")["input_ids"] == [1, 5, 7]


def test_a_model_without_a_tokenizer_or_a_card(merged, tmp_path):
    shutil.copytree(merged, tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md", "btx_recipe.yaml", "generation_config.json"):
        (tmp_path / "merged" / name).unlink()
    export(str(tmp_path / "merged"), tmp_path / "out")
    assert files_of(tmp_path / "out").keys() == {"config.json", "model.safetensors", "README.md"}
    assert "Its recipe" not in (tmp_path / "out/README.md").read_text()
    assert_same_bits(tmp_path / "merged", tmp_path / "out")


def test_the_card_keeps_what_holds(merged, tmp_path):
    shutil.copytree(merged, tmp_path / "merged")
    metadata = {
        **{"license": "other", "license_name": "ours", "license_link": "LICENSE.txt", "language": ["en", "de"]},
        **{"base_model": ["org/llama", "/home/me/llama"], "base_model_relation": "merge", "model-index": []},
        "tags": ["btx", "merge", "mine"],
    }
    (tmp_path / "merged/README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# Mine\n")
    export(str(tmp_path / "merged"), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(text.split("---")[1]) == {
        **{"library_name": "transformers", "pipeline_tag": "text-generation"},
        **{"license": "other", "license_name": "ours", "language": ["en", "de"]},
        **{"base_model": ["org/llama"], "base_model_relation": "merge"},
        "tags": ["mixtral", "mixture-of-experts", "merge", "mine"],
    }
    assert "# merged as a Mixtral\n\nMade from `merged`, " in text
    assert f"`btx export --format mixtral` of btx-merge {btx_merge.__version__}" in text
    assert "| 0 | seed |\n| 1 | code |\n| 2 | math |\n" in text
    of_the_hub = mixtral_card(open_merged(Located(tmp_path / "merged", "org/llama-btx", "abc123")))
    assert "# llama-btx as a Mixtral" in of_the_hub
    assert "[org/llama-btx](https://huggingface.co/org/llama-btx) at revision abc123" in of_the_hub


def test_the_python_of_its_card(merged, tmp_path):
    export(str(merged), tmp_path / "out")
    code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("The answer is", "w1 w2 w3")
    done = warm.run([sys.executable, "-c", code], cwd=tmp_path / "out", level="transformers")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("w1 w2 w3 w")


# What is refused


def refused(model: Path, output: Path, **options) -> list[str]:
    lines = problems_of(export, str(model), output, **options)
    assert not output.exists()
    assert not partial(output).exists()
    return lines


def test_what_a_mixtral_does_not_compute_is_refused_all_at_once(merged, tmp_path):
    shutil.copytree(merged, tmp_path / "merged")
    edit_json(
        tmp_path / "merged/config.json",
        router_type="soft",
        hidden_act="gelu",
        active_experts=["code"],
        rope_parameters={"rope_type": "new", "rope_theta": 1e4},
    )
    assert refused(tmp_path / "merged", tmp_path / "out", format="onnx", options=Options(max_shard_size="much")) == [
        "command: --format: 'onnx'; expected mixtral or gguf",
        "command: --max-shard-size: 'much'; expected a size such as 5GB, 500MB or 5GiB",
        "model: config.json: router_type: 'soft'; expected 'top_k', the only routing of a Mixtral. With top_k and "
        "num_experts_per_tok 3 in config.json it computes the same.",
        "model: config.json: active_experts: ['code']; expected all experts: a Mixtral cannot switch any off. "
        "Take the key out, or drop the others for good with btx edit --drop.",
        "model: config.json: hidden_act: 'gelu'; expected 'silu': vLLM and llama.cpp take that for any Mixtral, "
        "whatever its config says. Only the BTX model itself, in transformers, computes that.",
        "model: config.json: rope_parameters: rope_type 'new'; expected one of default, linear, dynamic, yarn, "
        "llama3, longrope. Only the BTX model itself, in transformers, computes that.",
    ]


@pytest.mark.parametrize("router", ["switch", "sample_top_1"])
def test_other_routings(merged, tmp_path, router):
    shutil.copytree(merged, tmp_path / "merged")
    edit_json(tmp_path / "merged/config.json", router_type=router)
    (line,) = refused(tmp_path / "merged", tmp_path / "out")
    assert line.startswith(f"model: config.json: router_type: '{router}'; expected 'top_k'")
    assert line.endswith(" Only the BTX model itself, in transformers, computes that.")


def test_a_softmax_before_the_selection(family, tmp_path):
    recipe = {"expert_mode": "split", "router_pre_softmax": True}
    merge(MergeRecipe(str(family.seed), family.experts, **recipe), tmp_path / "merged")
    (line,) = refused(tmp_path / "merged", tmp_path / "out")
    assert "router_pre_softmax: True; expected false: a Mixtral's weights add up to 1" in line


def test_soft_routing_as_its_remedy_says(merged, tmp_path):
    shutil.copytree(merged, tmp_path / "soft")
    edit_json(tmp_path / "soft/config.json", router_type="soft")
    shutil.copytree(tmp_path / "soft", tmp_path / "top_k")
    edit_json(tmp_path / "top_k/config.json", router_type="top_k", num_experts_per_tok=3)
    export(str(tmp_path / "top_k"), tmp_path / "out")
    ours, theirs = logits_of(load(tmp_path / "soft")), logits_of(load(tmp_path / "out"))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_biases(tmp_path):
    merged = a_merge(tmp_path, save_seed(tmp_path / "seed", attention_bias=True))
    (line,) = refused(merged, tmp_path / "out")
    assert "attention_bias: True; expected false: a Mixtral has no biases" in line
    model = AutoModelForCausalLM.from_pretrained(merged, router_selection_bias=True)
    model.save_pretrained(tmp_path / "biased")
    lines = refused(tmp_path / "biased", tmp_path / "out")
    assert len(lines) == 2
    assert "router_selection_bias: True; expected false: a Mixtral chooses by the router alone" in lines[0]


def test_what_is_no_merged_model(family, merged, tmp_path):
    assert refused(tmp_path / "nothing", tmp_path / "out") == [
        f"model: {tmp_path / 'nothing'}: no such folder; expected a folder with config.json and weights, or a Hub id "
        "`org/name` or `org/name@revision`. Check the path."
    ]
    assert refused(family.seed, tmp_path / "out") == [
        "model: config.json: model_type: 'llama', a dense Llama; expected 'btx'. Merge first. Make an expert of it: "
        "btx merge --seed SEED --expert NAME=MODEL."
    ]
    (tmp_path / "empty").mkdir()
    (line,) = refused(tmp_path / "empty", tmp_path / "out")
    assert line.startswith(f"model: {tmp_path / 'empty/config.json'}: missing; expected a folder saved by")


def test_a_config_and_weights_that_are_not_of_one_model(merged, tmp_path):
    shutil.copytree(merged, tmp_path / "merged")
    config = tmp_path / "merged/config.json"
    edit_json(config, num_experts_per_tok=4, expert_names=["a", "a", "b"], num_chunks=2, num_attention_heads="4")
    assert refused(tmp_path / "merged", tmp_path / "out") == [
        'model: config.json: num_attention_heads: "4"; expected a whole number above 0. '
        "Save it again with save_pretrained, or download it again.",
        "model: config.json: num_experts_per_tok: 4; expected a whole number in [1, 3], the number of experts",
        "model: config.json: num_chunks: 2; expected a divisor of the 3 experts",
        "model: config.json: expert_names: ['a', 'a', 'b']; expected 3 different names",
    ]
    shutil.copyfile(merged / "config.json", config)
    edit_json(config, num_local_experts=2, expert_names=None, num_hidden_layers=1)
    lines = refused(tmp_path / "merged", tmp_path / "out")
    assert len(lines) == 3 + 5  # three tensors for another number of experts; of a layer four, and how many more
    assert any(
        "model.layers.0.mlp.gate.weight: shape [3, 64]; expected [2, 64] by config.json" in line for line in lines
    )
    edit_json(config, num_local_experts=None, vocab_size=None)
    assert [line.split(";")[0] for line in refused(tmp_path / "merged", tmp_path / "out")] == [
        "model: config.json: vocab_size: missing",
        "model: config.json: num_local_experts: None",
    ]
    shutil.copyfile(merged / "config.json", config)
    edit_json(config, num_chunks=3, expert_names=["a.0", "a.1", "b.2"])
    assert refused(tmp_path / "merged", tmp_path / "out") == [
        "model: config.json: expert_names: ['a.0', 'a.1', 'b.2']; "
        "expected the names of each source's 3 chunks in order, such as code.0 to code.2"
    ]


def test_a_truncated_file_is_named(merged, tmp_path):
    shutil.copytree(merged, tmp_path / "merged")
    shard = sorted((tmp_path / "merged").glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 4)
    (line,) = refused(tmp_path / "merged", tmp_path / "out")
    assert f"{shard.name}: truncated" in line


def test_the_model_itself_is_never_the_output(merged, tmp_path):
    model = shutil.copytree(merged, tmp_path / "room" / "merged")
    before = files_of(tmp_path)
    for output in (model, tmp_path / "room"):
        with pytest.raises(InputError, match=r"is where the model lies\. Give another --output\."):
            export(str(model), output, Options(overwrite=True))
        assert files_of(tmp_path) == before


# Carrying it out


def test_an_interrupted_export_continues(merged, tmp_path, monkeypatch):
    export(str(merged), tmp_path / "whole", Options(max_shard_size="200KB"))
    monkeypatch.setattr("btx_merge.checkpoints.copying.JOB_BYTES", 10_000)
    monkeypatch.setattr("btx_merge.checkpoints.copying.BLOCK_BYTES", 4_000)
    with pytest.raises(MergeInterrupted, match="the same command continues"):
        export(
            str(merged),
            tmp_path / "out",
            Options(max_shard_size="200KB", workers=1),
            reporter=Told(bytes_done=ctrl_c_after(200_000)),
        )
    assert not (tmp_path / "out").exists()
    assert not (partial(tmp_path / "out") / "config.json").exists()
    for name in ("tokenizer.json", "README.md"):
        (partial(tmp_path / "out") / name).write_text("{")  # a part of it, as a kill leaves it
    moved, announced = [], []
    reporter = Told(bytes_done=moved.append, started=announced.append)
    report = export(str(merged), tmp_path / "out", Options(max_shard_size="200KB"), reporter)
    assert report.kept_bytes >= 200_000
    assert announced == [sum(moved)]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
