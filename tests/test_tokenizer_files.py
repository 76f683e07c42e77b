"""A result reads every text as its source does, and keeps the templates, whatever form the tokenizer has."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from btx_merge import InputError, MergeRecipe, check, export, extract, merge
from btx_merge.tokenizer_files import check_alike, load_tokenizer
from tests.common import edit_json, grow, save_seed, tiny_tokenizer

LINES = ("hello world", "x = 12345", "  two  spaces", "</s>hello", "</s>  hello", "é 北京")
TEMPLATES = {"default": "plain {{ messages }}", "tool_use": "tools {{ messages }}"}


@pytest.mark.parametrize("prepends", [False, True])
def test_sentencepiece_is_read_alike_by_merge_export_and_extract(tmp_path: Path, prepends: bool) -> None:
    model = io.BytesIO()
    lines = ["hello world, hello there", "x = 12345 and so on"] * 50
    options = {"model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "vocab_size": 330}
    options |= {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, remove_extra_whitespaces=False, minloglevel=2, **options
    )
    rows = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    seed = save_seed(tmp_path / "seed", tokenizer=False, vocab_size=rows, bos_token_id=1, eos_token_id=2)
    expert = grow(seed, tmp_path / "e")
    for folder in (seed, expert):
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        values = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
    if prepends:
        values = json.loads(AutoTokenizer.from_pretrained(seed).backend_tokenizer.to_str())
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        prepend = {"type": "Prepend", "prepend": "▁"}
        values |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [prepend, space]}}
        for folder in (seed, expert):
            (folder / "tokenizer.model").unlink()
            (folder / "tokenizer.json").write_text(json.dumps(values))
    merge(MergeRecipe(str(seed), {"e": str(expert)}), tmp_path / "merged")
    export(str(tmp_path / "merged"), tmp_path / "mixtral")
    extract(str(tmp_path / "merged"), "e", tmp_path / "dense")
    own = AutoTokenizer.from_pretrained(seed)
    for name in ("merged", "mixtral", "dense"):
        made = AutoTokenizer.from_pretrained(tmp_path / name)
        for line in LINES:
            assert made(line)["input_ids"] == own(line)["input_ids"], (name, line)


def test_a_difference_shows_the_line(tmp_path: Path) -> None:
    save_seed(tmp_path / "a")
    save_seed(tmp_path / "b")
    values = json.loads((tmp_path / "b/tokenizer.json").read_text())
    values["model"]["unk_token"] = "w1"
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="'Hello world' is read as"):
        check_alike(load_tokenizer(tmp_path / "a"), tmp_path / "b")


def test_named_templates_travel(tmp_path: Path) -> None:
    seed = save_seed(tmp_path / "seed")
    expert = grow(seed, tmp_path / "e")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(seed)
    merge(MergeRecipe(str(seed), {"e": str(expert)}), tmp_path / "merged")
    export(str(tmp_path / "merged"), tmp_path / "mixtral")
    extract(str(tmp_path / "merged"), "e", tmp_path / "dense")
    for name in ("merged", "mixtral", "dense"):
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == TEMPLATES


def test_a_template_without_a_vocabulary_beside_it(tmp_path: Path) -> None:
    seed = save_seed(tmp_path / "seed")
    expert = grow(seed, tmp_path / "e")
    (expert / "tokenizer.json").unlink()
    edit_json(expert / "tokenizer_config.json", eos_token="w3")
    (expert / "chat_template.jinja").write_text("the expert's")
    merge(MergeRecipe(str(seed), {"e": str(expert)}, tokenizer_source="e"), tmp_path / "merged")
    made = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (made.chat_template, made.eos_token) == ("the expert's", "w3")


def test_no_tokenizer_is_said(tmp_path: Path) -> None:
    seed = save_seed(tmp_path / "seed", tokenizer=False)
    expert = grow(seed, tmp_path / "e")
    warnings = check(MergeRecipe(str(seed), {"e": str(expert)})).warnings
    assert any("no source has one" in str(warning) for warning in warnings)
