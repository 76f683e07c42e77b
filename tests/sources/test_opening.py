"""A source is what lies in its folder, in whatever files; and nothing that lies about itself is taken."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from btx_merge import InputError, MergeRecipe, check, merge
from btx_merge.sources.locate import Located
from btx_merge.sources.opening import open_each
from btx_merge.sources.source import SEED, ExpertSpec, Source
from tests.conftest import Family
from tests.support.common import edit_json, grow, problems_of, save_seed, tensors_of


def open_one(folder: Path, expert: str | Path | None = None) -> Source:
    """A folder opened as the seed, or an expert opened beside it."""
    specs = {SEED: ExpertSpec(str(folder))}
    if expert is not None:
        specs["expert"] = ExpertSpec(str(expert))

    def scratch() -> Path:
        raise AssertionError("nothing here needs peft to merge it")

    sources, problems = open_each(specs, None, scratch)
    if problems:
        raise InputError(problems)
    return list(sources.values())[-1]


def refusal(folder: Path) -> list[str]:
    lines = problems_of(open_one, folder)
    assert all(line.startswith("seed: ") for line in lines)
    return [line.removeprefix("seed: ") for line in lines]


def all_values(source: Source) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(source.rows(name, 0, tensor.shape[0])).float()
        for name, tensor in source.tensors.items()
    }


def save_as(folder: Path, source: Path, form: str) -> Path:
    """A checkpoint's copy in another form of files."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = tensors_of(source)
    if form == "single safetensors":
        save_file(tensors, folder / "model.safetensors")
        return folder
    if form == "single bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    suffix, stem = ("safetensors", "model") if form == "sharded safetensors" else ("bin", "pytorch_model")
    weight_map: dict[str, str] = {}
    for number in range(3):
        part = {name: tensors[name] for name in sorted(tensors)[number::3]}
        file = f"{stem}-{number + 1:05}-of-00003.{suffix}"
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


SAVE_AGAIN = ". Save it again with save_pretrained, or download it again."
COPY_THE_REST = ". Give another folder, or copy the missing file there."
FORMS = ["single safetensors", "sharded safetensors", "single bin", "sharded bin"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_files_holds_the_same(form: str, family: Family, tmp_path: Path) -> None:
    expected = tensors_of(family.code)
    found = all_values(open_one(save_as(tmp_path / "copy", family.code, form)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_of_sources_may_be_mixed(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every pairing of the three; the merge is the mean in float32, cast once to the seed's dtype."""
    seed = save_seed(tmp_path / "seed", dtype=dtype, tokenizer=False)
    others = {
        "a": save_seed(tmp_path / "a", dtype=torch.float32, tokenizer=False),
        "b": save_seed(tmp_path / "b", dtype=torch.float16, tokenizer=False),
        "c": save_as(tmp_path / "c", save_seed(tmp_path / "c0", dtype=torch.bfloat16, tokenizer=False), "single bin"),
    }
    report = merge(MergeRecipe(str(seed), {name: str(path) for name, path in others.items()}), tmp_path / "out")
    assert report.checked.to_dict()["dtype"] == str(dtype).removeprefix("torch.")
    merged = tensors_of(tmp_path / "out")
    sources = [tensors_of(folder) for folder in (seed, others["a"], others["b"], tmp_path / "c0")]
    assert {tensors["model.norm.weight"].dtype for tensors in sources} == {
        torch.float32,
        torch.float16,
        torch.bfloat16,
    }
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"):
        mean = sum(tensors[name].float() for tensors in sources) / 4
        assert merged[name].dtype == dtype
        assert torch.equal(merged[name], mean.to(dtype))
    down = merged["model.layers.0.mlp.experts.down_proj"]
    for number, tensors in enumerate(sources):
        assert torch.equal(down[number], tensors["model.layers.0.mlp.down_proj.weight"].to(dtype))


def test_one_source_may_mix_dtypes(family: Family, tmp_path: Path) -> None:
    """As a checkpoint with norms in float32 does. Its dtype is that of most of its bytes."""
    folder = save_as(tmp_path / "mixed", family.seed, "single bin")
    tensors = {
        name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors_of(family.seed).items()
    }
    torch.save(tensors, folder / "pytorch_model.bin")
    source = open_one(folder)
    assert source.dtype == "BF16"
    values = all_values(source)
    assert all(torch.equal(values[name], tensor.float()) for name, tensor in tensors.items())


def test_safetensors_are_preferred_to_a_bin_beside_them(family: Family, tmp_path: Path) -> None:
    for form in ("single safetensors", "sharded safetensors"):
        folder = save_as(tmp_path / form, family.seed, form)
        (folder / "pytorch_model.bin").write_bytes(b"not read")
        assert len(open_one(folder).tensors) == len(tensors_of(family.seed))


def test_seed_and_experts_in_every_form_at_once(family: Family, tmp_path: Path) -> None:
    plain = MergeRecipe(str(family.seed), family.experts)
    other = MergeRecipe(
        str(save_as(tmp_path / "seed", family.seed, "sharded bin")),
        {
            "code": str(save_as(tmp_path / "code", family.code, "single bin")),
            "math": str(save_as(tmp_path / "math", family.math, "sharded safetensors")),
        },
    )
    merge(plain, tmp_path / "plain")
    merge(other, tmp_path / "other")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "other")]
    assert files[0] == files[1]


# Folders and indexes


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("./nowhere", "./nowhere: no such folder; expected a folder with config.json and weights, or a Hub id"),
        ("/nowhere/at/all", "/nowhere/at/all: no such folder; expected a folder"),
        ("~/nowhere-at-all", "~/nowhere-at-all: no such folder; expected a folder"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x: no such folder; expected a folder"),
        ("x" * 300, f"{'x' * 300}: no such folder, and no name that a repository can have ("),
        ("nul\0byte", r"nul\x00byte: no such folder; expected a folder"),
        ("a/b/c", "a/b/c: no such folder; expected a folder"),
        ("org/name with space", "org/name with space: no such folder; expected a folder"),
        ("org/na--me", "org/na--me: no such folder, and no name that a repository can have ("),
        ("org/name..x", "org/name..x: no such folder, and no name that a repository can have ("),
        ("org/-name", "org/-name: no such folder, and no name that a repository can have ("),
        ("-org", "-org: no such folder, and no name that a repository can have ("),
        ("org/name.git", "org/name.git: no such folder, and no name that a repository can have ("),
        ("o" * 97, f"{'o' * 97}: no such folder, and no name that a repository can have ("),
        ("org/name", "org/name: not a folder, not in the Hub's cache, and the Hub cannot be reached; expected"),
        ("org/name@v1", "org/name@v1: not a folder, not in the Hub's cache, and the Hub cannot be reached; expected"),
    ],
)
def test_references_to_nothing(reference: str, said: str) -> None:
    (line,) = refusal(Path(reference) if reference != "./nowhere" else reference)  # type: ignore[arg-type]
    assert line.startswith(said)


def test_a_file_in_place_of_a_folder(family: Family) -> None:
    (line,) = refusal(family.seed / "model.safetensors")
    assert line.startswith(f"{family.seed / 'model.safetensors'}: a file; expected a folder with config.json")


def test_an_empty_folder(tmp_path: Path) -> None:
    expected = f"{tmp_path / 'config.json'}: missing; expected a folder saved by save_pretrained"
    assert refusal(tmp_path) == [expected + COPY_THE_REST]


def test_a_folder_without_weights(family: Family, tmp_path: Path) -> None:
    shutil.copy(family.seed / "config.json", tmp_path)
    expected = "model.safetensors or pytorch_model.bin, or shards with their index"
    assert refusal(tmp_path) == [f"{tmp_path}: no weights; expected {expected}{COPY_THE_REST}"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "not JSON: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "not JSON: "),
        (b"", "not JSON: Expecting value"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_that_are_no_json(name: str, content: bytes, said: str, family: Family, tmp_path: Path) -> None:
    folder = save_as(tmp_path / "copy", family.seed, "sharded safetensors")
    (folder / name).write_bytes(content)
    (line,) = refusal(folder)
    assert line.startswith(f"{folder / name}: {said}")


@pytest.fixture
def sharded(family: Family, tmp_path: Path) -> Path:
    return save_as(tmp_path / "sharded", family.seed, "sharded safetensors")


INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]


def edit_weight_map(folder: Path, **files: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(files)
    (folder / INDEX).write_text(json.dumps(index))


def test_a_shard_that_is_a_broken_link(sharded: Path) -> None:
    """As in a Hub cache that was cleaned up by hand."""
    (sharded / SHARDS[1]).unlink()
    (sharded / SHARDS[1]).symlink_to(sharded / "blobs" / "gone")
    assert refusal(sharded)[0].startswith(f"{SHARDS[1]}: missing; ")


def test_shards_behind_links_are_read(sharded: Path, tmp_path: Path) -> None:
    """As in every Hub cache; a link that leads elsewhere is refused."""
    snapshot, blob = tmp_path / "cache/snapshots/abc", tmp_path / "cache/blobs/123"
    snapshot.parent.mkdir(parents=True)
    blob.parent.mkdir()
    sharded.rename(snapshot)
    (snapshot / SHARDS[1]).rename(blob)
    (snapshot / SHARDS[1]).symlink_to(Path("../../blobs/123"))
    assert len(open_one(snapshot).tensors) == 21
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    (line,) = refusal(snapshot)
    assert f"a link that leads out of the folder, to {tmp_path / 'elsewhere'}" in line


def test_truncated_and_missing_shards_in_one_report(sharded: Path) -> None:
    whole = (sharded / SHARDS[0]).read_bytes()
    (sharded / SHARDS[0]).write_bytes(whole[:-10])
    (sharded / SHARDS[1]).unlink()
    (sharded / SHARDS[2]).write_bytes(b"")
    assert refusal(sharded) == [
        f"{SHARDS[0]}: truncated: {len(whole) - 10:,} bytes; expected {len(whole):,}. "
        "Download or copy the file again.",
        f"{SHARDS[1]}: missing; expected beside {INDEX}, which names it. Download or copy the missing file.",
        f"{SHARDS[2]}: 0 bytes, not even a header; expected a safetensors file. Download or copy the file again.",
    ]


@pytest.mark.parametrize(
    "target", ["../../secret.safetensors", "{outside}", "sub/secret.safetensors", "../sharded/.."]
)
def test_an_index_that_points_outside_its_folder(target: str, sharded: Path, tmp_path: Path) -> None:
    """Whatever lies there is not opened, even if it is a perfect shard."""
    outside = tmp_path / "secret.safetensors"
    save_file({"model.norm.weight": torch.ones(64)}, outside)
    (sharded / "sub").mkdir()
    shutil.copy(outside, sharded / "sub")
    target = target.format(outside=outside)
    edit_weight_map(sharded, **{"model.norm.weight": target})
    line = f"{INDEX}: points outside its folder, to {target}; expected file names"
    assert refusal(sharded) == [f"{line}. Do not use this checkpoint as it is."]


@pytest.mark.parametrize("target", ["", ".", ".."])
def test_an_index_that_names_a_folder(target: str, sharded: Path) -> None:
    edit_weight_map(sharded, **{"model.norm.weight": target})
    (line,) = refusal(sharded)
    assert line.startswith(f"{INDEX}: points outside its folder, to {target}; expected file names")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 5}, "text"])
def test_an_index_without_a_weight_map(weight_map: Any, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(sharded) == [f"{INDEX}: no weight_map; expected tensor name to file name{SAVE_AGAIN}"]


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    twice = "model.norm.weight"
    shard = json.loads((sharded / INDEX).read_text())["weight_map"][twice]
    assert shard == SHARDS[2]
    extra = {**tensors_of_file(sharded / SHARDS[0]), twice: torch.zeros(64)}
    save_file(extra, sharded / SHARDS[0])
    assert refusal(sharded) == [f"{SHARDS[2]}: {twice} stands there and in {SHARDS[0]}; expected once{SAVE_AGAIN}"]


def test_an_index_that_names_a_tensor_which_the_shard_lacks(sharded: Path) -> None:
    edit_weight_map(sharded, **{"model.norm.weight": SHARDS[0], "phantom.weight": SHARDS[1]})
    assert refusal(sharded) == [
        f"{SHARDS[0]}: lacks model.norm.weight; expected it there, by {INDEX}{SAVE_AGAIN}",
        f"{SHARDS[1]}: lacks phantom.weight; expected it there, by {INDEX}{SAVE_AGAIN}",
    ]


BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("shard", [SHARDS[0], "model-of-buffers.safetensors"])
def test_an_index_that_names_what_a_merge_passes_over(shard: str, sharded: Path, tmp_path: Path) -> None:
    """Buffers of the rotary embedding that nobody stores now, and the head of a tied checkpoint."""
    edit_weight_map(sharded, **{BUFFER: shard})
    assert len(open_one(sharded).tensors) == 21
    tied = save_seed(tmp_path / "tied", tie_word_embeddings=True)
    (tied / "model.safetensors").rename(tied / SHARDS[0])
    names = {**dict.fromkeys(tensors_of_file(tied / SHARDS[0]), SHARDS[0]), "lm_head.weight": shard, BUFFER: shard}
    (tied / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert len(open_one(tied).tensors) == 20
    check(MergeRecipe(str(tied), {"twin": str(tied)}))
    edit_json(tied / "config.json", tie_word_embeddings=False)
    (line,) = refusal(tied)
    lacking = f"{SHARDS[0]}: lacks lm_head.weight" if shard == SHARDS[0] else f"{shard}: missing"
    assert line.startswith(lacking)


def test_a_broken_file_beside_whole_shards(sharded: Path) -> None:
    (sharded / "model.safetensors").write_bytes(b"\0" * 500)
    lines = refusal(sharded)
    assert lines[0].startswith("model.safetensors: unreadable header: ")
    assert lines[1] == (
        f"{INDEX}: lies beside model.safetensors, which cannot be read; expected only one of them. "
        f"If the shards that {INDEX} names are the model, remove model.safetensors."
    )
    (sharded / "model.safetensors").unlink()
    assert len(open_one(sharded).tensors) == 21


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "a\nb", "\x1b[2J"])
def test_an_index_with_names_that_no_file_has(name: str, sharded: Path) -> None:
    edit_weight_map(sharded, **{"model.norm.weight": name})
    (line,) = refusal(sharded)
    assert line.startswith(f"{INDEX}: names ")
    assert "which no file should be called" in line


def test_a_folder_that_may_not_be_entered(family: Family, tmp_path: Path) -> None:
    """Said by the check, in its report. To root nothing is forbidden: it becomes another user meanwhile."""
    closed = tmp_path / "closed"
    shutil.copytree(family.code, closed / "model")
    recipe = MergeRecipe(str(family.seed), {"code": str(closed / "model")})
    assert check(recipe).warnings == ()
    closed.chmod(0)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        with pytest.raises(InputError) as caught:
            check(recipe)
    finally:
        if is_root:
            os.seteuid(0)
        closed.chmod(0o700)
    assert "code: " in str(caught.value)
    assert "Permission denied; expected a folder that can be entered" in str(caught.value)


def tensors_of_file(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(file))


def test_problems_of_the_files_of_all_sources_in_one_report(family: Family, sharded: Path, tmp_path: Path) -> None:
    (sharded / SHARDS[0]).unlink()
    lying = save_as(tmp_path / "lying", family.code, "single safetensors")
    (lying / "model.safetensors").write_bytes(b"\xff" * 100)
    experts = {"sharded": str(sharded), "lying": str(lying), "gone": "./gone", "fine": str(family.math)}
    with pytest.raises(InputError) as caught:
        check(MergeRecipe(str(family.seed), experts))
    found = [(problem.source, problem.where) for problem in caught.value.problems]
    assert found == [("sharded", SHARDS[0]), ("lying", "model.safetensors"), ("gone", "./gone")]


# Values of config.json


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", "64", 'config.json: hidden_size: "64"; expected a whole number above 0'),
        ("hidden_size", 64.5, "config.json: hidden_size: 64.5; expected a whole number above 0"),
        ("num_attention_heads", 0, "config.json: num_attention_heads: 0; expected a whole number above 0"),
        ("num_hidden_layers", -1, "config.json: num_hidden_layers: -1; expected a whole number above 0"),
        ("vocab_size", True, "config.json: vocab_size: true; expected a whole number above 0"),
        ("head_dim", [16], "config.json: head_dim: [16]; expected a whole number above 0"),
        ("tie_word_embeddings", "no", 'config.json: tie_word_embeddings: "no"; expected true or false'),
        ("rms_norm_eps", "1e-5", 'config.json: rms_norm_eps: "1e-5"; expected a number, at least 0'),
        ("rope_theta", {}, "config.json: rope_theta: {}; expected a number above 0"),
        ("rope_scaling", "linear", 'config.json: rope_scaling: "linear"; expected an object of numbers and words'),
        ("rope_parameters", [1], "config.json: rope_parameters: [1]; expected an object of numbers and words"),
        ("rms_norm_eps", float("nan"), "config.json: rms_norm_eps: NaN; expected a number, at least 0"),
        ("initializer_range", -0.02, "config.json: initializer_range: -0.02; expected a number, at least 0"),
        (
            "hidden_act",
            {"a": 1},
            'config.json: hidden_act: {"a": 1}; expected an activation that transformers knows, such as silu',
        ),
    ],
)
def test_odd_values_of_a_config(key: str, value: Any, said: str, family: Family, tmp_path: Path) -> None:
    folder = save_as(tmp_path / "copy", family.seed, "single bin")
    edit_json(folder / "config.json", **{key: value})
    assert refusal(folder) == [said + SAVE_AGAIN]


def test_more_layers_than_there_are_tensors_for(family: Family, tmp_path: Path) -> None:
    """Found before a name is made for each of a thousand million layers."""
    folder = save_as(tmp_path / "copy", family.seed, "single safetensors")
    edit_json(folder / "config.json", num_hidden_layers=10**9)
    (line,) = refusal(folder)
    assert line.startswith("config.json: num_hidden_layers: 1,000,000,000; expected no more than its 21 tensors")


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "rope_scaling"])
def test_values_of_a_config_that_may_be_null(key: str, family: Family, tmp_path: Path) -> None:
    folder = save_as(tmp_path / "copy", family.seed, "single safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: None}))
    assert open_one(folder).config["head_dim"] == 16


# Code


EVIL = """
from pathlib import Path
Path(__file__).with_name("it-ran").touch()
Path({marker!r}).touch()
import transformers
class C(transformers.LlamaConfig): pass
class M(transformers.LlamaForCausalLM): config_class = C
class T(transformers.PreTrainedTokenizerFast): pass
"""


@pytest.mark.filterwarnings("ignore:::transformers")
def test_code_in_a_folder_never_runs(family: Family, tmp_path: Path, folder_code: Path) -> None:
    """Neither for the seed, nor for an expert, nor for a base that peft merges an adapter into."""
    from peft import LoraConfig, get_peft_model

    marker = tmp_path / "it-ran"
    folders = {name: tmp_path / name for name in ("seed", "code")}
    for name, folder in folders.items():
        shutil.copytree(getattr(family, name), folder)
        (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
        auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoModel": "evil.M"}
        edit_json(folder / "config.json", auto_map=auto_map)
        edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.T"]})
    dora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folders["seed"], trust_remote_code=False),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, use_dora=True),
    )
    dora.save_pretrained(tmp_path / "dora")
    (tmp_path / "dora" / "evil.py").write_text(EVIL.format(marker=str(marker)))
    assert not marker.exists()
    recipe = MergeRecipe(str(folders["seed"]), {"code": str(folders["code"]), "dora": str(tmp_path / "dora")})
    check(recipe)
    merge(recipe, tmp_path / "out")
    assert not marker.exists()
    assert not list(tmp_path.rglob("it-ran"))
    assert "evil" not in (tmp_path / "out" / "config.json").read_text()
    assert "evil" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert not (tmp_path / "out" / "evil.py").exists()
    AutoModelForCausalLM.from_pretrained(folders["seed"], trust_remote_code=True)
    assert marker.exists()  # so this test is able to fail
    assert list(folder_code.rglob("it-ran"))


# What the rest asks of a source


def test_rows_are_exact_and_may_be_kept(family: Family) -> None:
    """The buffer that reading uses is overwritten by the next read; what `rows` returns is not."""
    source = open_one(family.seed)
    expected = tensors_of(family.seed)["model.embed_tokens.weight"].numpy()
    first = source.rows("model.embed_tokens.weight", 3, 7)
    second = source.rows("model.embed_tokens.weight", 50, 54)
    assert np.array_equal(first, expected[3:7])
    assert np.array_equal(second, expected[50:54])


def test_the_head_of_a_tied_source_is_its_embedding(tmp_path: Path) -> None:
    source = open_one(save_seed(tmp_path / "tied", tie_word_embeddings=True))
    expected = tensors_of(tmp_path / "tied")
    assert "lm_head.weight" not in expected
    assert np.array_equal(source.rows("lm_head.weight", 0, 128), expected["model.embed_tokens.weight"].numpy())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\nlanguage:\n- en\n- 5\n- {a: b}\n---\nText", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("no front matter", {}),
        ("---\n[1, 2\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("---\ndate: 2024-99-99\n---\n", {}),
        ("---\nlanguage: 7\nlicense: mit\n---\n", {"license": "mit"}),
        (b"---\nlicense: \xff\n---\n", {}),
        (None, {}),
    ],
)
def test_cards_of_every_kind(
    text: str | bytes | None, expected: dict[str, Any], family: Family, tmp_path: Path
) -> None:
    """A strange card is no reason to stop a merge."""
    folders = [save_as(tmp_path / name, family.seed, "single safetensors") for name in ("seed", "expert")]
    for folder in folders if text is not None else ():
        (folder / "README.md").write_bytes(text.encode() if isinstance(text, str) else text)
    found = open_one(folders[0]).card_metadata()
    assert {key: value for key, value in found.items() if key == "license"} == expected
    merge(MergeRecipe(str(folders[0]), {"expert": str(folders[1])}), tmp_path / "out")
    metadata = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert metadata.get("license") == expected.get("license")
    assert metadata.get("language", ["en"]) == ["en"]


def test_public_names_show_no_path(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Located(family.seed).public_name == "llama-seed"
    assert Located(family.seed, "org/name", "abc").public_name == "org/name"
    monkeypatch.chdir(family.seed)
    assert Located(Path(".")).public_name == "llama-seed"


def test_an_unfinished_download_of_another_form_beside_does_not_matter(family: Family, tmp_path: Path) -> None:
    folder = grow(family.seed, tmp_path / "copy")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "gone.bin"}}')
    assert len(open_one(folder).tensors) == 21
