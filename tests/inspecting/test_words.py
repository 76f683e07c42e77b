"""The text of each token."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from btx_merge.inspecting.words import shown, words_of
from tests.support.common import tiny_tokenizer


def of_bytes() -> PreTrainedTokenizerFast:
    """Every byte a token, as the byte-level tokenizers of Llama 3 fall back to."""
    vocab = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_blanks() -> PreTrainedTokenizerFast:
    """As sentencepiece does it: a blank belongs to the word behind it, and goes where a text begins."""
    vocab = {"<unk>": 0, "▁one": 1, "▁two": 2, "s": 3}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", ["def f(x):\n\treturn é", "日本 \U0001f600!", "a" * 40])
def test_words_add_up_to_the_text(text: str) -> None:
    tokenizer = of_bytes()
    ids = tokenizer(text)["input_ids"]
    words = words_of(ids, tokenizer)
    assert len(words) == len(ids) == len(text.encode())
    assert "".join(words) == text


def test_the_last_part_of_a_character_has_it_all() -> None:
    tokenizer = of_bytes()
    assert words_of(tokenizer("aé€")["input_ids"], tokenizer) == ["a", "", "é", "", "", "€"]


def test_bytes_that_are_no_text() -> None:
    """Each of them is given up after a few tokens, so that a file of noise does not take quadratic time."""
    tokenizer = of_bytes()
    noise = tokenizer.convert_tokens_to_ids(["ÿ"] * 40)  # the byte 0xff
    calls: list[int] = []
    decode = tokenizer.decode

    def counted(ids: list[int], **options: object) -> str:
        calls.append(len(ids))
        return decode(ids, **options)

    tokenizer.decode = counted
    words = words_of(noise, tokenizer)
    assert "".join(words) == "\ufffd" * 40
    assert max(calls) <= 8


def test_a_blank_stays_with_its_word() -> None:
    assert words_of([1, 2, 3, 1], with_blanks()) == ["one", " two", "s", " one"]


def test_words_of_a_tokenizer_without_a_decoder() -> None:
    assert words_of([5, 6, 126], tiny_tokenizer()) == ["w5", " w6", " <s>"]


def test_what_cannot_be_seen_is_shown_as_escapes() -> None:
    assert shown("a\x1b[2J\u202eb\x00\u200b\n\t\u3000\ud800") == "a\\x1b[2J\\u202eb\\x00\\u200b\n\t\u3000\\ud800"
