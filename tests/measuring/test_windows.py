"""Windows of text: every token is scored once, after the tokens that lm-evaluation-harness gives it."""

from __future__ import annotations

import random

import pytest

from btx_merge.errors import InputError
from btx_merge.measuring.windows import amount_of, cut, windows_of
from tests.support.common import VOCAB, WORDS, tiny_tokenizer

BOS = VOCAB - 2


def document(length: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS[:50], k=length))


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_a_long_document_is_cut_as_the_harness_cuts_it():
    """By hand: `get_rolling_token_windows` with max_seq_len 3 and context_len 1, then `make_disjoint_window`."""
    (first, second, third) = windows_of(["w5 w6 w7 w8 w9 w10 w11"], tiny_tokenizer(), 3)
    assert (first.ids, first.scored, first.offset) == ((BOS, 5, 6, 7), 3, 0)
    assert (second.ids, second.scored, second.offset) == ((7, 8, 9, 10), 3, 3)
    assert (third.ids, third.scored, third.offset) == ((8, 9, 10, 11), 1, 6)  # filled up with context


@pytest.mark.parametrize("length", [1, 2, 5, 16, 64])
def test_every_token_is_scored_once_after_those_before_it(length):
    texts = [document(size, size) for size in (1, length, length + 1, 2 * length, 37, 64)]
    scored: dict[int, list[int]] = {}
    for window in windows_of(texts, tiny_tokenizer(), length):
        own = ids_of(texts[window.document])
        assert len(window.ids) <= length + 1
        context = len(window.ids) - window.scored
        assert context >= 1
        before = own[max(0, window.offset - context) : window.offset] or [BOS]
        assert list(window.ids[:context]) == before
        assert window.offset == len(scored.setdefault(window.document, []))
        scored[window.document] += window.ids[context:]
    assert scored == {number: ids_of(text) for number, text in enumerate(texts)}


def test_bytes_are_those_of_the_text():
    texts = ["  w1   w2\nw3 w4  ", document(40)]
    windows = list(windows_of(texts, tiny_tokenizer(), 3))
    for number, text in enumerate(texts):
        assert sum(window.nbytes for window in windows if window.document == number) == len(text.encode())
    assert windows[0].nbytes == len("  w1   w2\nw3")


def test_a_part_of_a_domain_ends_after_a_whole_window_and_counts_its_own_bytes():
    texts = [document(10), document(40, 1)]
    windows = list(windows_of(texts, tiny_tokenizer(), 8, tokens=30))
    assert [window.scored for window in windows] == [8, 2, 8, 8]  # the next would be 34
    amount = amount_of(windows)
    part = " ".join(texts[1].split()[:16])
    assert (amount.documents, amount.windows, amount.tokens) == (2, 4, 26)
    assert amount.nbytes == len(texts[0]) + len(part)
    assert list(cut(texts, amount)) == [texts[0], part]


def test_the_first_window_is_always_there():
    assert [window.scored for window in windows_of([document(9)], tiny_tokenizer(), 8, tokens=1)] == [8]


def test_models_that_read_the_same_tokens_have_the_same_digest():
    texts = [document(20)]
    same, other = (amount_of(windows_of(texts, tiny_tokenizer(), 8)).digest for _ in range(2))
    assert same == other
    assert amount_of(windows_of(texts, tiny_tokenizer(), 7)).digest != same


def test_a_cut_within_a_character_counts_all_of_it():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*alphabet, "<s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    text = "a🙂b"  # one token for each of its 6 bytes
    windows = list(windows_of([text], fast, 2))
    assert [window.nbytes for window in windows] == [5, 0, 1]
    assert list(cut([text], amount_of(windows[:1]))) == ["a🙂"]


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(InputError, match="code: text: not a single token"):
        list(windows_of([], tiny_tokenizer(), 8, source="code"))
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"neither a bos nor an eos token; .* Name one in its tokenizer_config\.json"):
        list(windows_of(["w1"], tokenizer, 8))
    tokenizer.eos_token = "</s>"
    (window,) = windows_of(["w1"], tokenizer, 8)
    assert window.ids == (VOCAB - 1, 1)
