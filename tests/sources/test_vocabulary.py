"""Tokens are matched by their string: the rows against a slow reference, and the tokenizer with them."""

from __future__ import annotations

import ast
import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from btx_merge import ExpertSpec, InputError, MergeRecipe, check, merge
from btx_merge.sources.byte_pairs import meetings
from btx_merge.sources.segments import Segment, runs
from tests.support.common import (
    WORDS,
    assert_complete,
    edit_json,
    grow,
    rows_are_shared,
    save_seed,
    tensors_of,
    tiny_tokenizer,
)

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seed(tmp_path_factory.mktemp("vocabulary") / "llama-seed")


@pytest.fixture(scope="module")
def padded_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 tokens and 136 rows."""
    return save_seed(tmp_path_factory.mktemp("vocabulary") / "padded-seed", vocab_size=136)


def grown(seed: Path, folder: Path, added: list[str], rows: int | None = None, number: int = 1, **save: Any) -> Path:
    """An expert with tokens added and its embedding resized, to `rows` or to the tokenizer's length."""
    tokenizer = tiny_tokenizer(added)

    def resize(model: LlamaForCausalLM) -> None:
        torch.manual_seed(number)
        model.resize_token_embeddings(rows or max(len(tokenizer), model.config.vocab_size), mean_resizing=False)

    return grow(seed, folder, random_seed=number, change=resize, tokenizer=tokenizer, **save)


def set_token_ids(folder: Path, ids: Mapping[str, int]) -> Path:
    """Writes tokens into tokenizer.json as added ones under ids of our choice."""
    data = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    kept = [entry for entry in data["added_tokens"] if entry["content"] not in ids]
    data["added_tokens"] = kept + [{"id": row, "content": token, **flags} for token, row in ids.items()]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def ids_in(folder: Path) -> dict[str, int]:
    """A tokenizer's own answer."""
    return dict(AutoTokenizer.from_pretrained(folder).get_vocab())


def expected_table(name: str, folders: list[Path], weights: list[float] | None = None) -> torch.Tensor:
    """The slow reference: every row of the result, one by one, from the tokenizers' own vocabularies.

    A token's row is the mean over the sources that own the token, in the result under the seed's id or, for new
    tokens, under the next free one, in the order of the sources and of their ids. A row without a token is the
    mean over the sources that have such a row and no token there.
    """
    weights = weights or [1.0] * len(folders)
    tables = [tensors_of(folder)[name].float() for folder in folders]
    vocabularies = [ids_in(folder) for folder in folders]
    union = dict(vocabularies[0])
    for vocabulary in vocabularies[1:]:
        for token in sorted(vocabulary, key=lambda token: vocabulary[token]):
            if token not in union:
                union[token] = max(union.values()) + 1
    token_of = {row: token for token, row in union.items()}
    size = max(*(len(table) for table in tables), max(union.values()) + 1)
    rows = []
    for row in range(size):
        owners = []
        for table, vocabulary, weight in zip(tables, vocabularies, weights, strict=True):
            if row in token_of:
                if token_of[row] in vocabulary:
                    owners.append((table[vocabulary[token_of[row]]], weight))
            elif row < len(table) and row not in vocabulary.values():
                owners.append((table[row], weight))
        rows.append(sum(vector * weight for vector, weight in owners) / sum(weight for _, weight in owners))
    return torch.stack(rows)


def assert_merged(out: Path, folders: list[Path], weights: list[float] | None = None) -> None:
    """Both tables are the reference's, the tokenizer is their union, and every source's text means the same."""
    assert_complete(out)
    merged = tensors_of(out)
    for name in TABLES:
        expected = expected_table(name, folders, weights)
        torch.testing.assert_close(
            merged[name], expected, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: name + text
        )
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(merged[TABLES[0]])
    tokenizer, seed = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(folders[0])
    ids = tokenizer.get_vocab()
    assert ids.items() >= seed.get_vocab().items()
    assert set(ids) == {token for folder in folders for token in ids_in(folder)}
    assert len(set(ids.values())) == len(ids)
    text = " ".join(WORDS[::7]) + " <s> w3 </s>"
    assert tokenizer(text)["input_ids"] == seed(text)["input_ids"]
    for folder in folders:
        own = AutoTokenizer.from_pretrained(folder)
        for token in own.get_added_vocab():
            assert tokenizer(token)["input_ids"] == [ids[token]]
            assert tokenizer.decode([ids[token]]) == token
            text = f"w5 {token} w6"
            assert tokenizer(text)["input_ids"] == [
                ids[own.convert_ids_to_tokens(row)] for row in own(text)["input_ids"]
            ]


def merge_all(folders: list[Path], out: Path, **changes: Any) -> None:
    experts = {f"e{number}": str(folder) for number, folder in enumerate(folders[1:])}
    merge(MergeRecipe(str(folders[0]), experts, **changes), out)


def test_equal_vocabularies(seed: Path, tmp_path: Path) -> None:
    folders = [seed, grow(seed, tmp_path / "a", random_seed=1), grow(seed, tmp_path / "b", random_seed=2)]
    merge_all(folders, tmp_path / "out")
    assert_merged(tmp_path / "out", folders)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (seed / "tokenizer.json").read_bytes()


def test_the_same_tokenizer_saved_differently(seed: Path, tmp_path: Path) -> None:
    """Other whitespace, as another version writes it: still the same rows, as one block."""
    folder = grow(seed, tmp_path / "a")
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(data, indent=None, sort_keys=True))
    checked = check(MergeRecipe(str(seed), {"a": str(folder)}))
    assert rows_are_shared(checked)
    assert checked.plan.vocabulary.new_tokens == ()


def test_one_expert_has_grown(seed: Path, tmp_path: Path) -> None:
    folders = [seed, grown(seed, tmp_path / "a", ["<|x|>", "<|y|>"]), grow(seed, tmp_path / "b", random_seed=2)]
    merge_all(folders, tmp_path / "out")
    assert_merged(tmp_path / "out", folders)
    merged, expert = tensors_of(tmp_path / "out"), tensors_of(folders[1])
    for name in TABLES:
        assert merged[name].shape == (130, 64)
        torch.testing.assert_close(merged[name][128:], expert[name][128:], rtol=0, atol=0)  # its owner's alone
    assert ids_in(tmp_path / "out")["<|y|>"] == 129


def test_the_same_token_under_different_ids(seed: Path, tmp_path: Path) -> None:
    folders = [
        seed,
        grown(seed, tmp_path / "a", ["<|x|>", "<|y|>", "<|both|>"], number=1),
        grown(seed, tmp_path / "b", ["<|both|>", "<|z|>"], number=2),
    ]
    merge_all(folders, tmp_path / "out")
    assert_merged(tmp_path / "out", folders)
    new = {"<|x|>": 128, "<|y|>": 129, "<|both|>": 130, "<|z|>": 131}
    assert {token: ids_in(tmp_path / "out")[token] for token in new} == new
    a, b, merged = (tensors_of(folder)["model.embed_tokens.weight"] for folder in (*folders[1:], tmp_path / "out"))
    torch.testing.assert_close(merged[130], (a[130] + b[128]) / 2)


def test_padded_seed(padded_seed: Path, tmp_path: Path) -> None:
    """Padding is kept; a new token takes over a padding row, and the seed's padding has no part in it."""
    folders = [
        padded_seed,
        grow(padded_seed, tmp_path / "a", random_seed=1),
        grown(padded_seed, tmp_path / "b", ["<|x|>"], number=2),
    ]
    merge_all(folders, tmp_path / "out")
    assert_merged(tmp_path / "out", folders)
    merged, expert = tensors_of(tmp_path / "out"), tensors_of(folders[2])
    for name in TABLES:
        assert merged[name].shape == (136, 64)
        assert torch.equal(merged[name][128], expert[name][128])
        torch.testing.assert_close(merged[name][129:], sum(tensors_of(folder)[name][129:] for folder in folders) / 3)


def test_expert_padded_more_than_the_seed(seed: Path, tmp_path: Path) -> None:
    folders = [seed, grown(seed, tmp_path / "a", [], rows=192), grow(seed, tmp_path / "b", random_seed=2)]
    merge_all(folders, tmp_path / "out")
    assert_merged(tmp_path / "out", folders)
    merged, expert = tensors_of(tmp_path / "out"), tensors_of(folders[1])
    for name in TABLES:
        assert torch.equal(merged[name][128:], expert[name][128:])


def test_grown_and_padded_at_once(padded_seed: Path, tmp_path: Path) -> None:
    """Different padding, tokens beyond each other's rows, a weighted combining."""
    folders = [
        padded_seed,
        grown(padded_seed, tmp_path / "a", [f"<|a{n}|>" for n in range(12)], rows=150, number=1),
        grown(padded_seed, tmp_path / "b", ["<|b|>", "<|a3|>"], rows=144, number=2),
        grown(padded_seed, tmp_path / "c", ["<|a11|>", "<|b|>", "<|c|>"], rows=136, number=3),
    ]
    experts = {name: ExpertSpec(str(f), w) for name, f, w in zip("abc", folders[1:], (2.0, 0.5, 1.0), strict=True)}
    merge(MergeRecipe(str(padded_seed), experts, combine="weighted"), tmp_path / "out")
    assert_merged(tmp_path / "out", folders, [1.0, 2.0, 0.5, 1.0])
    assert len(tensors_of(tmp_path / "out")[TABLES[0]]) == 150


def test_tokens_with_holes_before_them(padded_seed: Path, tmp_path: Path) -> None:
    """An expert that put its token behind the padding: the result puts it where the next free id is.

    Where it was before, only padding is left, and the token's row has no part in that.
    """
    far = set_token_ids(grown(padded_seed, tmp_path / "far", [], rows=140), {"<|far|>": 139})
    longer = grown(padded_seed, tmp_path / "longer", [], rows=140, number=2)
    merge_all([padded_seed, far, longer], tmp_path / "out")
    a, b, merged = (tensors_of(folder) for folder in (far, longer, tmp_path / "out"))
    for name in TABLES:
        assert torch.equal(merged[name][128], a[name][139])
        assert torch.equal(merged[name][139], b[name][139])
        torch.testing.assert_close(merged[name][138], (a[name][138] + b[name][138]) / 2)
    assert ids_in(tmp_path / "out")["<|far|>"] == 128


def test_without_the_seed_as_an_expert(seed: Path, tmp_path: Path) -> None:
    """Tokens that only the seed owns are still there."""
    own = copy(seed, tmp_path / "own-token")
    tensors = load_file(own / "model.safetensors")
    tensors |= {name: torch.cat([tensors[name], torch.full((1, 64), 0.5)]) for name in TABLES}
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    edit_json(own / "config.json", vocab_size=129)
    set_token_ids(own, {"<|seed|>": 128})
    folders = [grow(seed, tmp_path / "a", random_seed=1), grown(seed, tmp_path / "b", [], rows=160, number=2)]
    merge_all([own, *folders], tmp_path / "out", seed_expert=False)
    for name in TABLES:
        merged = tensors_of(tmp_path / "out")[name]
        assert torch.equal(merged[128], torch.full((64,), 0.5))
        torch.testing.assert_close(merged[:128], sum(tensors_of(folder)[name][:128] for folder in folders) / 2)


def test_in_bfloat16_a_row_of_one_owner_is_copied(tmp_path: Path) -> None:
    seed = save_seed(tmp_path / "seed", dtype=torch.bfloat16)
    expert = grown(seed, tmp_path / "a", ["<|x|>"])
    merge_all([seed, expert], tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[TABLES[0]][128], tensors_of(expert)[TABLES[0]][128])
    assert tensors_of(tmp_path / "out")[TABLES[0]].dtype == torch.bfloat16


def test_tied_and_grown(tmp_path: Path) -> None:
    seed = save_seed(tmp_path / "seed", tie_word_embeddings=True)
    expert = grown(seed, tmp_path / "a", ["<|x|>"])
    merge_all([seed, expert], tmp_path / "out")
    assert_complete(tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    assert "lm_head.weight" not in merged
    torch.testing.assert_close(merged[TABLES[0]], expected_table(TABLES[0], [seed, expert]))


# Conflicts


def refusal(seed: Path, **experts: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        check(MergeRecipe(str(seed), {name: str(folder) for name, folder in experts.items()}))
    for problem in caught.value.problems:
        assert all((problem.where, problem.found, problem.expected, problem.remedy)), problem
    return [str(problem) for problem in caught.value.problems]


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    data = json.loads((folder / "tokenizer.json").read_text())
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def test_conflicts_are_refused_with_examples(seed: Path, tmp_path: Path) -> None:
    def shift(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        vocab |= {f"w{number}": (number + 1) % 100 for number in range(100)}

    odd = edit_tokenizer(grow(seed, tmp_path / "odd"), shift)
    assert refusal(seed, odd=odd, fine=grow(seed, tmp_path / "fine", random_seed=2)) == [
        "odd: odd/tokenizer.json: 100 ids name other tokens than in the seed: 0 is 'w99' here and 'w0' in the seed; "
        "1 is 'w0' here and 'w1' in the seed; 2 is 'w1' here and 'w2' in the seed; expected the seed's tokens under "
        "the seed's ids. Only added tokens may differ; use experts that kept the seed's vocabulary."
    ]


def test_an_added_token_in_place_of_one_of_the_seeds(tmp_path: Path) -> None:
    """The seed's own added tokens are shared too: an expert may not put others under their ids."""
    seed = save_seed(tmp_path / "seed", vocab_size=136)
    tiny_tokenizer(["<|pad|>"]).save_pretrained(seed)
    odd = grown(seed, tmp_path / "odd", ["<|im_start|>"])
    (line,) = refusal(seed, odd=odd)
    assert "1 ids name other tokens than in the seed: 128 is '<|im_start|>' here and '<|pad|>' in the seed;" in line


def test_another_base_vocabulary(seed: Path, tmp_path: Path) -> None:
    """Grown by training the tokenizer on: such tokens are cut from text by other rules."""
    odd = grown(seed, tmp_path / "odd", [], rows=131)
    edit_tokenizer(odd, lambda data: data["model"]["vocab"].update({"neu": 128, "mehr": 129, "noch": 130}))
    assert refusal(seed, odd=odd) == [
        "odd: odd/tokenizer.json: its base vocabulary or its merges differ from those of the seed (3 other tokens: "
        "'neu', 'mehr', 'noch'); expected the seed's. Only tokens added with add_tokens can be joined."
    ]


def test_more_tokens_than_rows(seed: Path, tmp_path: Path) -> None:
    odd = grow(seed, tmp_path / "odd", tokenizer=tiny_tokenizer(["<pad>"]))
    assert refusal(seed, odd=odd) == [
        "odd: odd/tokenizer.json: a token has id 128, but the embedding has 128 rows; expected a row for every token. "
        "Resize the model to its tokenizer: model.resize_token_embeddings(len(tokenizer))."
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSONDecodeError: Expecting property name"),
        ("[]", "TypeError: "),
        ("{}", "KeyError: 'model'"),
        ('{"model": {"vocab": {"a": "b"}}}', "ValueError: a token's id is no number"),
        ('{"model": {"vocab": {"a": -1}}}', "ValueError: a token's id is no number"),
        ("[" * 100_000, "ValueError: too deeply nested"),
    ],
)
def test_unreadable_tokenizers(content: str, reason: str, seed: Path, tmp_path: Path) -> None:
    odd = grow(seed, tmp_path / "odd")
    (odd / "tokenizer.json").write_text(content)
    (line,) = refusal(seed, odd=odd)
    assert line.startswith(f"odd: odd/tokenizer.json: unreadable tokenizer ({reason}")
    assert line.endswith("expected what tokenizer.save_pretrained writes. Save it again, or copy the seed's.")


def test_all_conflicts_in_one_report(seed: Path, tmp_path: Path) -> None:
    broken = grow(seed, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    swapped = edit_tokenizer(
        grow(seed, tmp_path / "swapped", random_seed=2), lambda data: data["model"]["vocab"].update(w1=2, w2=1)
    )
    short = grow(seed, tmp_path / "short", random_seed=3, tokenizer=tiny_tokenizer(["<pad>"]))
    lines = refusal(seed, broken=broken, swapped=swapped, short=short)
    assert [line.split(":")[0] for line in lines] == ["broken", "swapped", "short"]


# Sources without a tokenizer


def without_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    return folder


def test_nobody_has_a_tokenizer(tmp_path: Path) -> None:
    seed = save_seed(tmp_path / "seed", tokenizer=False)
    expert = grow(seed, tmp_path / "a")
    merge_all([seed, expert], tmp_path / "out")
    assert_complete(tmp_path / "out")
    assert not list((tmp_path / "out").glob("tokenizer*"))
    for name in TABLES:
        a, b, merged = (tensors_of(folder)[name] for folder in (seed, expert, tmp_path / "out"))
        torch.testing.assert_close(merged, (a + b) / 2)


def test_an_expert_without_a_tokenizer_has_the_seeds(seed: Path, tmp_path: Path) -> None:
    folders = [seed, grown(seed, tmp_path / "a", ["<|x|>"], number=1), grow(seed, tmp_path / "b", random_seed=2)]
    expected = {name: expected_table(name, folders) for name in TABLES}
    without_tokenizer(folders[2])
    merge_all(folders, tmp_path / "out")
    for name in TABLES:
        torch.testing.assert_close(tensors_of(tmp_path / "out")[name], expected[name], rtol=1e-6, atol=1e-7)


def test_an_expert_without_a_tokenizer_and_with_other_rows(seed: Path, tmp_path: Path) -> None:
    odd = without_tokenizer(grown(seed, tmp_path / "odd", ["<|x|>"]))
    assert refusal(seed, odd=odd) == [
        "odd: vocabulary: 129 rows, and odd has no tokenizer; expected 128 rows as in the seed, or a tokenizer.json "
        "that names the others. Copy the files of odd's tokenizer into its folder."
    ]


def test_a_seed_without_a_tokenizer_gets_the_one_of_its_experts(tmp_path: Path) -> None:
    seed = save_seed(tmp_path / "seed", tokenizer=False)
    folders = [grow(seed, tmp_path / name, random_seed=n, tokenizer=tiny_tokenizer()) for n, name in enumerate("ab")]
    merge_all([seed, *folders], tmp_path / "out")
    assert ids_in(tmp_path / "out") == ids_in(folders[0])
    a, b, c, merged = (tensors_of(folder)[TABLES[0]] for folder in (seed, *folders, tmp_path / "out"))
    torch.testing.assert_close(merged, (a + b + c) / 3)


def test_a_seed_without_a_tokenizer_cannot_tell_what_was_added(tmp_path: Path) -> None:
    """Two experts with other tokens under one id: averaging them would be a silent loss of both."""
    seed = save_seed(tmp_path / "seed", vocab_size=136, tokenizer=False)
    a = grown(seed, tmp_path / "a", ["<|x|>"], number=1)
    b = grown(seed, tmp_path / "b", ["<|y|>"], number=2)
    c = grown(seed, tmp_path / "c", ["<|z|>"], rows=140, number=3)
    assert refusal(seed, a=a, b=b, c=c) == [
        "b: b/tokenizer.json: other tokens than in a, and the seed has no tokenizer; expected the seed's tokens and "
        "added ones. Copy the files of the seed's tokenizer into its folder.",
        "c: vocabulary: 140 rows, and seed has no tokenizer; expected 136 rows as in the seed, or a tokenizer.json "
        "that names the others. Copy the files of seed's tokenizer into its folder.",
    ]


# Other kinds of tokenizer.json


def bpe(folder: Path, merges: list[Any], **model: Any) -> Path:
    """A byte pair tokenizer with its merges as given."""
    vocab = {piece: row for row, piece in enumerate(["a", "b", "c", "d", "ab", "cd", "abcd"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("c", "d"), ("ab", "cd")]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return edit_tokenizer(folder, lambda data: data["model"].update(merges=merges, **model))


OLD_MERGES, NEW_MERGES = ["a b", "c d", "ab cd"], [["a", "b"], ["c", "d"], ["ab", "cd"]]


def test_merges_in_both_spellings_are_the_same(tmp_path: Path) -> None:
    """tokenizers changed how it writes them; a seed and an expert saved since differ in nothing else."""
    seed = bpe(save_seed(tmp_path / "seed", tokenizer=False), OLD_MERGES)
    expert = grow(seed, tmp_path / "a")
    bpe(expert, NEW_MERGES, ignore_merges=True, continuing_subword_prefix="")
    checked = check(MergeRecipe(str(seed), {"a": str(expert)}))
    assert rows_are_shared(checked)
    merge_all([seed, expert], tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abcd cd")["input_ids"] == [6, 5]


SPACE = "\u2581"
PREPENDED = {"type": "Prepend", "prepend": SPACE}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
LEGACY = {"normalizer": {"type": "Sequence", "normalizers": [PREPENDED, SPACES]}, "pre_tokenizer": None}
META = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("seed_rules", "own_rules", "key"),
    [
        ({}, {"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({}, {"normalizer": {"type": "NFC"}}, "normalizer"),
        ({}, {"pre_tokenizer": None}, "pre_tokenizer"),
        ({}, {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}}, "pre_tokenizer"),
        ({"pre_tokenizer": DIGITS}, {"pre_tokenizer": {**DIGITS, "individual_digits": False}}, "pre_tokenizer"),
        ({"pre_tokenizer": BYTES}, {"pre_tokenizer": {**BYTES, "add_prefix_space": True}}, "pre_tokenizer"),
        ({"pre_tokenizer": BYTES}, {"pre_tokenizer": {**BYTES, "use_regex": False}}, "pre_tokenizer"),
        ({"pre_tokenizer": BYTES}, {"pre_tokenizer": {**BYTES, "trim_offsets": False}}, ""),
        ({"pre_tokenizer": BYTES}, {"pre_tokenizer": {k: v for k, v in BYTES.items() if k != "use_regex"}}, ""),
        (LEGACY, {"pre_tokenizer": META}, ""),
        (LEGACY, {"pre_tokenizer": {**META, "prepend_scheme": "always"}}, ""),
        (LEGACY, {"pre_tokenizer": {**META, "prepend_scheme": "never"}}, "pre_tokenizer"),
        (LEGACY, {"pre_tokenizer": {**META, "split": True}}, "pre_tokenizer"),
        ({"normalizer": SPACES, "pre_tokenizer": None}, {"pre_tokenizer": {**META, "prepend_scheme": "never"}}, ""),
        (LEGACY, {"normalizer": SPACES, "pre_tokenizer": None}, "pre_tokenizer"),
        ({}, {"model": {"byte_fallback": True}}, "model.byte_fallback"),
        ({}, {"model": {"end_of_word_suffix": "</w>"}}, "model.end_of_word_suffix"),
        ({}, {"model": {"end_of_word_suffix": "", "byte_fallback": False}}, ""),
        ({}, {"normalizer": {"type": "a kind of the future"}}, "normalizer"),
    ],
)
def test_rules_that_read_texts_differently(
    seed_rules: dict[str, Any], own_rules: dict[str, Any], key: str, tmp_path: Path
) -> None:
    """The tokens and the merges are the same, and the ids of a text are not."""
    seed = bpe(save_seed(tmp_path / "seed", tokenizer=False), OLD_MERGES)
    edit_tokenizer(seed, lambda data: data.update(seed_rules))
    expert = grow(seed, tmp_path / "odd")
    model = own_rules.get("model", {})
    bpe(expert, OLD_MERGES, **model)
    edit_tokenizer(expert, lambda data: data.update({k: v for k, v in own_rules.items() if k != "model"}))
    if not key:
        assert rows_are_shared(check(MergeRecipe(str(seed), {"odd": str(expert)})))
        return
    (line,) = refusal(seed, odd=expert)
    assert line.startswith(f"odd: odd/tokenizer.json: {key} is ")
    assert "so it reads texts otherwise than the seed; expected " in line
    assert line.endswith("copy the seed's tokenizer.json there.")


def test_ignored_merges_where_no_merges_lead_to_a_token(tmp_path: Path) -> None:
    """With `ignore_merges` a word that is a token is that token; without, it is what the merges make of it."""
    seed = bpe(save_seed(tmp_path / "seed", tokenizer=False), OLD_MERGES[:2])
    expert = grow(seed, tmp_path / "odd")
    bpe(expert, OLD_MERGES[:2], ignore_merges=True)
    (line,) = refusal(seed, odd=expert)
    assert "odd/tokenizer.json: model.ignore_merges is True, so it reads texts otherwise than the seed; " in line


def test_merges_in_an_order_that_no_text_shows(tmp_path: Path) -> None:
    """The last merge needs the two before it, whatever its rank."""
    seed = bpe(save_seed(tmp_path / "seed", tokenizer=False), OLD_MERGES)
    expert = grow(seed, tmp_path / "a")
    bpe(expert, OLD_MERGES[::-1])
    assert rows_are_shared(check(MergeRecipe(str(seed), {"a": str(expert)})))


def test_other_merges_are_refused(tmp_path: Path) -> None:
    seed = bpe(save_seed(tmp_path / "seed", tokenizer=False), OLD_MERGES)
    expert = grow(seed, tmp_path / "odd")
    bpe(expert, OLD_MERGES[:2])
    (line,) = refusal(seed, odd=expert)
    assert "its base vocabulary or its merges differ from those of the seed; expected the seed's" in line


def test_a_merge_that_is_none_is_refused(seed: Path, tmp_path: Path) -> None:
    for number, merges in enumerate([["a b c"], [["a", 1]], [7]]):
        odd = bpe(grow(seed, tmp_path / str(number)), merges)
        (line,) = refusal(seed, odd=odd)
        assert "unreadable tokenizer (" in line


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """tokenizer.json of a byte-level tokenizer, trained on Python's own code."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(Path(json.decoder.__file__).read_text().splitlines(), trainer)
    return dict(json.loads(made.to_str()))


def in_two_orders(trained: dict[str, Any], folder: Path, merges: list[Any], seed_tokenizer: bool = True) -> list[Path]:
    """A seed and two experts; the last has the trained tokenizer with these merges."""
    folders = [save_seed(folder / "seed", tokenizer=False, vocab_size=len(trained["model"]["vocab"]))]
    folders += [grow(folders[0], folder / name) for name in ("first", "odd")]
    for model in folders[0 if seed_tokenizer else 1 :]:
        (model / "tokenizer.json").write_text(json.dumps(trained))
    edit_tokenizer(folders[2], lambda data: data["model"].update(merges=merges))
    return folders


def test_merges_far_apart_that_never_meet(trained: dict[str, Any], tmp_path: Path) -> None:
    """No merge that moves has a token in common with one that it passes."""
    merges = list(trained["model"]["merges"])
    moved = 0
    for start in range(len(merges) - 1, 0, -1):
        place, (left, right) = start, merges[start]
        while place > 0 and not {left, right, left + right} & {*merges[place - 1], "".join(merges[place - 1])}:
            place -= 1
        if start - place > 20:
            merges.insert(place, merges.pop(start))
            moved += 1
        if moved == 50:
            break
    assert moved == 50
    seed, _, odd = in_two_orders(trained, tmp_path, merges)
    assert rows_are_shared(check(MergeRecipe(str(seed), {"odd": str(odd)})))


@pytest.mark.parametrize("seed_tokenizer", [True, False])
def test_two_merges_that_meet(trained: dict[str, Any], tmp_path: Path, seed_tokenizer: bool) -> None:
    """One swap of two merges that both want one token is found, and the text shown is really read differently."""
    merges = [tuple(pair) for pair in trained["model"]["merges"]]
    first = next(n for n, pair in enumerate(merges) if pair == ("Ġ", "i"))  # Ġi|n or Ġ|in
    second = next(n for n, pair in enumerate(merges) if pair == ("i", "n"))
    merges[first], merges[second] = merges[second], merges[first]
    seed, first_expert, odd = in_two_orders(trained, tmp_path, merges, seed_tokenizer)
    (line,) = refusal(seed, first=first_expert, odd=odd)
    named = "the seed" if seed_tokenizer else "first"
    found = re.search(
        rf"another order than those of {named}, which reads (.*) as (\[.*\]); here it is (\[.*\]);", line
    )
    assert found
    text, *expected = (ast.literal_eval(part) for part in found.groups())
    readings = [Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).tokens for path in (first_expert, odd)]
    assert readings == expected
    assert readings[0] != readings[1]


def test_meetings_against_all_triples() -> None:
    """Of random orders: each that is found is one, and where there are any, one is found."""
    tokens = ["a", "b", "c", "ab", "bc", "ca"]
    pairs = [(left, right) for left in tokens for right in tokens]
    chance = random.Random(1)
    for size in (2, 3, 5, 36):
        for _ in range(200):
            merges = chance.sample(pairs, size)
            others = list(merges)
            chance.shuffle(others)
            if chance.random() < 0.5:  # one of them has moved
                others = [*merges[1:], merges[0]]
            expected = {
                (x, y, z)
                for x, y in merges
                for left, z in merges
                if left == y
                and (merges.index((x, y)) < merges.index((y, z))) != (others.index((x, y)) < others.index((y, z)))
            }
            found = set(meetings(merges, others))
            assert found <= expected
            assert bool(found) == bool(expected)


def test_unigram_vocabularies(tmp_path: Path) -> None:
    """Their base vocabulary is a list of pieces with scores."""
    seed = save_seed(tmp_path / "seed", tokenizer=False)
    expert = grow(seed, tmp_path / "a")
    for folder, piece in ((seed, "b"), (expert, "x")):
        tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), (piece, -2.0)], 0))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    (line,) = refusal(seed, odd=expert)
    assert "1 ids name other tokens than in the seed: 2 is 'x' here and 'b' in the seed;" in line


# tokenizer_source


@pytest.fixture
def chat(seed: Path, tmp_path: Path) -> Path:
    """An expert with a chat template and tokens of its own, under ids that the result gives to others."""
    folder = grown(seed, tmp_path / "chat", ["<|im_start|>", "<|im_end|>"], number=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|im_start|>"})
    tokenizer.chat_template = "{% for m in messages %}<|im_start|> {{ m.content }} <|im_end|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    edit_json(folder / "config.json", eos_token_id=[129, 127], pad_token_id=128, bos_token_id=126)
    GenerationConfig(
        eos_token_id=[129, 127], pad_token_id=128, bos_token_id=126, temperature=0.6, do_sample=True
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def other(seed: Path, tmp_path: Path) -> Path:
    """Comes first, and so its tokens get the first new ids."""
    return grown(seed, tmp_path / "other", ["<|x|>", "<|y|>", "<|z|>"], number=1)


def test_the_seeds_by_default(seed: Path, other: Path, chat: Path, tmp_path: Path) -> None:
    GenerationConfig(eos_token_id=127, temperature=0.9, do_sample=True).save_pretrained(seed)
    try:
        merge(MergeRecipe(str(seed), {"other": str(other), "chat": str(chat)}), tmp_path / "out")
    finally:
        (seed / "generation_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template is None
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", None)
    assert ids_in(tmp_path / "out")["<|im_end|>"] == 132
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (126, 127, None)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.temperature) == (127, 0.9)


def test_an_expert_that_the_recipe_names(seed: Path, other: Path, chat: Path, tmp_path: Path) -> None:
    """Its ids 128 and 129 are 131 and 132 in the result."""
    recipe = MergeRecipe(str(seed), {"other": str(other), "chat": str(chat)}, tokenizer_source="chat")
    merge(recipe, tmp_path / "out")
    assert_merged(tmp_path / "out", [seed, other, chat])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.get_vocab()
    assert (ids["<|im_start|>"], ids["<|im_end|>"]) == (131, 132)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 132)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_start|>", 131)
    assert tokenizer.bos_token_id == 126
    encoded = tokenizer.apply_chat_template([{"role": "user", "content": "w5 w6"}], return_dict=True)["input_ids"]
    assert encoded == [131, 5, 6, 132]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (126, [132, 127], 131)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.to_diff_dict().items() >= {"eos_token_id": [132, 127], "pad_token_id": 131}.items()
    assert (generation.bos_token_id, generation.temperature, generation.do_sample) == (126, 0.6, True)


def test_ids_that_old_versions_wrote_into_the_tokenizers_config(
    seed: Path, other: Path, chat: Path, tmp_path: Path
) -> None:
    """`added_tokens_decoder` names tokens by their ids, which move."""
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {"128": {"content": "<|im_start|>", **entry}, "129": {"content": "<|im_end|>", **entry}}
    edit_json(chat / "tokenizer_config.json", added_tokens_decoder=decoder, name_or_path="/home/me/secret")
    recipe = MergeRecipe(str(seed), {"other": str(other), "chat": str(chat)}, tokenizer_source="chat")
    merge(recipe, tmp_path / "out")
    text = (tmp_path / "out" / "tokenizer_config.json").read_text()
    written = {int(row): entry["content"] for row, entry in json.loads(text)["added_tokens_decoder"].items()}
    ids = ids_in(tmp_path / "out")
    assert written.items() >= {131: "<|im_start|>", 132: "<|im_end|>"}.items()
    assert all(ids[token] == row for row, token in written.items())
    assert "secret" not in text


def test_a_sources_chat_template_in_its_config(seed: Path, chat: Path, tmp_path: Path) -> None:
    """Where versions before 4.52 kept it."""
    template = (chat / "chat_template.jinja").read_text()
    (chat / "chat_template.jinja").unlink()
    edit_json(chat / "tokenizer_config.json", chat_template=template)
    merge(MergeRecipe(str(seed), {"chat": str(chat)}, tokenizer_source="chat"), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


# Runs of rows


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], ()),
        ([-1, -1], ()),
        ([0, 1, 2], (Segment(0, 0, 3),)),
        ([5, 6, -1, 7, 8], (Segment(0, 5, 2), Segment(3, 7, 2))),
        ([2, 1, 0], (Segment(0, 2, 1), Segment(1, 1, 1), Segment(2, 0, 1))),
        ([-1, 0, 1, 9, 10, 3], (Segment(1, 0, 2), Segment(3, 9, 2), Segment(5, 3, 1))),
    ],
)
def test_runs(rows: list[int], expected: tuple[Segment, ...]) -> None:
    assert runs(np.array(rows, int)) == expected
