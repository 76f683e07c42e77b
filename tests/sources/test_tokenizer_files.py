"""A result reads every text as its source does, and keeps the templates, whatever form the tokenizer has."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from btx_merge import DomainText, EditRecipe, InputError, MergeRecipe, check, edit, export, extract, merge
from btx_merge.sources.tokenizer_files import check_alike, load_tokenizer
from tests.support.common import edit_json, grow, problems_of, rows_are_shared, save_seed, tiny_tokenizer

LINES = ("hello world", "x = 12345", "  two  spaces", "</s>hello", "</s>  hello", "é 北京")
TEXT = ("hello world, hello there", "x = 12345 and so on")
TEMPLATES = {"default": "plain {{ messages }}", "tool_use": "tools {{ messages }}"}


def trained(lines: Sequence[str], size: int = 330) -> bytes:
    """Return a tokenizer.model of Llama 2's kind."""
    model = io.BytesIO()
    options = {"model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "vocab_size": size}
    options |= {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 50),
        model_writer=model,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def put(folder: Path, content: bytes) -> None:
    """Give a model this tokenizer.model alone."""
    (folder / "tokenizer.model").write_bytes(content)
    values = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("prepends", [False, True])
def test_sentencepiece_is_read_alike_by_merge_export_and_extract(tmp_path: Path, prepends: bool) -> None:
    content = trained(TEXT)
    rows = sentencepiece.SentencePieceProcessor(model_proto=content).get_piece_size()
    seed = save_seed(tmp_path / "seed", tokenizer=False, vocab_size=rows, bos_token_id=1, eos_token_id=2)
    expert = grow(seed, tmp_path / "e")
    for folder in (seed, expert):
        put(folder, content)
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


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A seed and an expert with rows enough for any tokenizer here, and without one."""
    seed = save_seed(tmp_path / "seed", tokenizer=False, vocab_size=400, bos_token_id=1, eos_token_id=2)
    return seed, grow(seed, tmp_path / "e")


def refusal(pair: tuple[Path, Path]) -> list[str]:
    return problems_of(check, MergeRecipe(str(pair[0]), {"e": str(pair[1])}))


def test_two_files_of_sentencepiece(pair: tuple[Path, Path]) -> None:
    own, other = trained(TEXT), trained(["another text entirely", "hello there worlds"])
    for folder in pair:
        put(folder, own)
    assert rows_are_shared(check(MergeRecipe(str(pair[0]), {"e": str(pair[1])})))
    put(pair[1], other)
    (line,) = refusal(pair)
    assert re.match(r"e: e/tokenizer\.model: \d+ ids name other tokens than in the seed: ", line)


@pytest.mark.parametrize("content", [b"", b"\0junk" * 9, b"aGVsbG8= 0\n", None], ids=["empty", "junk", "text", "half"])
def test_damaged_files_of_sentencepiece(pair: tuple[Path, Path], content: bytes | None) -> None:
    whole = trained(TEXT)
    for folder in pair:
        put(folder, whole[: len(whole) // 2] if content is None else content)
    remedy = "Download it again, or save the tokenizer with tokenizer.save_pretrained: that writes tokenizer.json."
    assert refusal(pair) == [
        f"{name}: {pair[n].name}/tokenizer.model: damaged; expected a model of sentencepiece. {remedy}"
        for n, name in enumerate(["seed", "e"])
    ]


def test_sentencepiece_that_cannot_be_imported(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, text in zip(pair, [TEXT, ["another text"]], strict=True):
        put(folder, trained(text))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert refusal(pair) == [
        "seed: seed/tokenizer.model: cannot be read: sentencepiece is not installed. Run: pip install sentencepiece"
    ]


def test_vocab_json_and_merges_txt(tmp_path: Path) -> None:
    """GPT-2's files: lines have the same ids in what is merged, exported and extracted; so has an added token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXT * 50, trainer)
    seed = save_seed(tmp_path / "seed", tokenizer=False, vocab_size=304, bos_token_id=0, eos_token_id=1)
    expert = grow(seed, tmp_path / "e")
    for folder in (seed, expert):
        made.model.save(str(folder))
        values = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
    rows = made.get_vocab_size()
    (expert / "added_tokens.json").write_text(json.dumps({"<|new|>": rows}))
    merge(MergeRecipe(str(seed), {"e": str(expert)}), tmp_path / "merged")
    export(str(tmp_path / "merged"), tmp_path / "mixtral")
    extract(str(tmp_path / "merged"), "e", tmp_path / "dense")
    own = AutoTokenizer.from_pretrained(expert)
    assert len(own("hello world")["input_ids"]) < len("hello world")
    for name in ("merged", "mixtral", "dense"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        for line in (*LINES, "hello<|new|> world"):
            assert tokenizer(line)["input_ids"] == own(line)["input_ids"], (name, line)
        assert tokenizer.convert_tokens_to_ids("<|new|>") == rows
    (tmp_path / "news.txt").write_text("\n".join(TEXT * 20))
    recipe = EditRecipe(
        str(tmp_path / "merged"),
        add={"news": str(grow(expert, tmp_path / "news"))},
        domain_text=(DomainText("news", (str(tmp_path / "news.txt"),)),),
    )
    assert edit(recipe, tmp_path / "edited").router_rows == {"news": "ridge"}


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
