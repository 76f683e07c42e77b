"""The mixture that `btx train` reads: shares by weight, held-out parts, one order for all ranks, no contamination."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from btx_merge import InputError
from btx_merge.finetuning.data import DomainStream, MixedWindows, collate, row_of
from btx_merge.texts.references import DomainText
from tests.support.common import tiny_tokenizer
from tests.support.models import tiny_btx


def stream(folder: Path, name: str, docs: list[str], weight: float = 1.0, holdout: float = 0.0) -> DomainStream:
    (folder / name).mkdir()
    for number, document in enumerate(docs):
        (folder / name / f"{number:03}.txt").write_text(document)
    return DomainStream(DomainText(name, (str(folder / name),), weight), tiny_tokenizer(), 8, holdout)


def words(first: int, count: int = 7) -> str:
    """With the end a window of 8."""
    return " ".join(f"w{first}" for _ in range(count))


@pytest.fixture
def two(tmp_path) -> list[DomainStream]:
    return [
        stream(tmp_path, "code", [words(number) for number in range(20)]),
        stream(tmp_path, "math", [words(number) for number in range(50, 60)], 3.0),
    ]


def test_domains_are_drawn_by_weight(two):
    """4,000 draws of a quarter: four deviations are 0.028."""
    rows = list(itertools.islice(MixedWindows(two, 4, seed=1), 4000))
    share = sum(row["domain"] == 0 for row in rows) / len(rows)
    assert share == pytest.approx(0.25, abs=0.028)
    for row in rows:
        assert (row["input_ids"][0] < 50) == (row["domain"] == 0)


def test_every_window_comes_once_in_a_pass(two):
    """In an order that is not the file's, and that is the seed's."""
    (code, _) = two
    one = [ids[0] for ids, _ in itertools.islice(code.endless(1, "x"), 40)]
    assert one == [*range(20), *range(20)]
    drawn = [ids[0] for ids, _ in itertools.islice(code.endless(6, "x"), 400)]
    assert drawn[:20] != one[:20]
    assert all(15 <= drawn.count(number) <= 25 for number in range(20))
    assert drawn == [ids[0] for ids, _ in itertools.islice(code.endless(6, "x"), 400)]
    assert drawn != [ids[0] for ids, _ in itertools.islice(code.endless(6, "y"), 400)]


def test_the_order_hangs_on_the_seed_alone(two):
    rows, again, other = (
        [row["input_ids"] for row in itertools.islice(MixedWindows(two, 4, seed=seed), 60)] for seed in (1, 1, 2)
    )
    assert rows == again
    assert rows != other


def test_what_is_held_out_is_not_trained_on(tmp_path):
    code = stream(tmp_path, "code", [words(number) for number in range(30)], holdout=0.1)
    assert [ids[0] for ids, _ in code.held_out(64)] == [1, 11, 21]
    assert [ids[0] for ids, _ in code.held_out(2)] == [1, 11]
    trained = {ids[0] for ids, _ in itertools.islice(code.endless(1, "x"), 100)}
    assert trained == set(range(30)) - {1, 11, 21}


def test_one_document_gives_some_of_its_windows(tmp_path):
    book = stream(tmp_path, "book", [" ".join(f"w{number}" for number in range(80))], holdout=0.25)
    assert [ids[0] for ids, _ in book.held_out(64)] == [8, 40, 72]
    trained = {ids[0] for ids, _ in itertools.islice(book.endless(1, "x"), 50)}
    assert trained == {0, 16, 24, 32, 48, 56, 64}


def test_nothing_but_a_held_out_part_is_refused(tmp_path):
    code = stream(tmp_path, "code", ["", words(1)], holdout=0.0)
    assert code.held_out(64) == []
    blank = stream(tmp_path, "blank", ["  "])
    with pytest.raises(InputError, match="blank: text: not a single token"):
        next(blank.endless(1, "x"))


def test_rows_become_tensors():
    """The first token of each document is no label, and neither is what fills a short row."""
    batch = collate([row_of(([5, 6, 7, 8], [0, 1, 0, 1]), 1), row_of(([9, 10], [0, 1]), 0)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8], [-100, 10, -100, -100]]
    assert batch["domain"].tolist() == [1, 0]


def test_a_packed_batch_has_the_loss_of_its_documents_alone():
    model = tiny_btx().eval()
    parts = [list(range(3, 10)), list(range(20, 25))]
    packed = collate([row_of(([*parts[0], *parts[1]], [*range(7), *range(5)]), 0)])
    packed.pop("domain")
    with torch.no_grad():
        ours = model(**packed, use_cache=False).loss
        alone = [model(torch.tensor([part]), labels=torch.tensor([part])).loss for part in parts]
    torch.testing.assert_close(ours, (6 * alone[0] + 4 * alone[1]) / 10, atol=1e-5, rtol=0)


def test_it_is_a_dataset_for_a_loader(two):
    loader = DataLoader(MixedWindows(two, 4, seed=1), batch_size=3, collate_fn=collate)
    batches = list(itertools.islice(loader, 2))
    rows = list(itertools.islice(MixedWindows(two, 4, seed=1), 6))
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == [row["input_ids"] for row in rows]
