"""Texts by domain: what is given to a flag, every kind of file, errors that name the place, packed windows."""

from __future__ import annotations

import json
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from btx_merge import MergeRecipe
from btx_merge.editing.recipe import EditRecipe
from btx_merge.finetuning.recipe import TrainRecipe
from btx_merge.fitting.recipe import FitRecipe
from btx_merge.sources.text_checks import check_texts, shared_text_warnings
from btx_merge.texts import readers as textfiles
from btx_merge.texts import references as texts
from btx_merge.texts.references import DomainText, documents, domain_texts_of, parse_domain_texts
from btx_merge.texts.windows import packed_windows
from tests.support.common import problems_of, tiny_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}{{ eos_token }}"


def read(*references: Any, tokenizer: Any = None) -> list[str]:
    return list(documents(DomainText("code", tuple(map(str, references))), tokenizer))


def refused(*references: Any, tokenizer: Any = None) -> str:
    (problem,) = problems_of(lambda: read(*references, tokenizer=tokenizer))
    return problem


# What is given


def test_items_of_a_flag(tmp_path):
    (tmp_path / "a:0.5").write_text("x")
    items = [
        "code=a.jsonl",
        "math=m/*.parquet:0.4",
        "code=b.jsonl:2",
        f"wiki={tmp_path}/a:0.5",
        "hub=org/name@main:1e-1",
    ]
    assert parse_domain_texts("--data", items) == (
        DomainText("code", ("a.jsonl", "b.jsonl"), 2.0),
        DomainText("math", ("m/*.parquet",), 0.4),
        DomainText("wiki", (f"{tmp_path}/a:0.5",), 1.0),
        DomainText("hub", ("org/name@main",), 0.1),
    )


def test_all_problems_of_a_flag_come_together():
    given = ["code", "=x", "a b=x", "math=", "m=x:0", "n=x:nan", "o=x:1", "o=y:2", "p=x", "p=x"]
    found = problems_of(parse_domain_texts, "--data", given)
    assert all(line.startswith("command: --data: ") for line in found)
    assert [line.split(": ")[2].split(";")[0] for line in found] == [
        *("code", "=x", "a b=x", "math=", "m=x:0", "n=x:nan", "o has the weights 1 and 2", "p=x")
    ]
    assert "such as code=code.jsonl" in found[0]
    assert "the weight 0; expected a number above 0" in found[4]


def test_domains_of_a_file(tmp_path):
    (tmp_path / "code.jsonl").write_text("{}")
    values = {"code": "code.jsonl", "math": ["org/name", "./m.csv"], "wiki": {"text": "org/wiki", "weight": 3}}
    assert domain_texts_of("train.yaml", values, [tmp_path]) == (
        DomainText("code", (f"{tmp_path}/code.jsonl",)),
        DomainText("math", ("org/name", f"{tmp_path}/m.csv")),
        DomainText("wiki", ("org/wiki",), 3.0),
    )
    wrong = {"a b": "x", "c": 3, "d": {"weight": 1}, "e": {"text": "x", "weight": "1"}, "f": {"text": "x", "more": 1}}
    found = problems_of(domain_texts_of, "train.yaml", wrong, [tmp_path])
    places = ["data", "data.c", "data.d", "data.e.weight", "data.f"]
    assert [line.split(": ")[1] for line in found] == places
    assert problems_of(domain_texts_of, "train.yaml", ["x"], [tmp_path])[0].startswith("train.yaml: data: ['x']")


def test_what_can_be_seen_without_reading(tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "code.py").write_text("x")
    (tmp_path / "fine.txt").write_text("x")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "t.parquet")
    (tmp_path / "nothing").mkdir()
    references = ["missing.jsonl", "./missing", "*.none", "empty.jsonl", "code.py", "nothing", "fine.txt", "org/name"]
    monkeypatch.chdir(tmp_path)
    found = [str(problem) for problem in check_texts([DomainText("code", tuple(references))])]
    assert [line.split(": ")[1] for line in found] == references[:6]
    said = ["no such file", "no such file", "no file matches", "an empty file", "the suffix .py", "a folder without"]
    assert all(text in line for text, line in zip(said, found, strict=True))
    monkeypatch.setattr(texts, "is_installed", lambda package: False)
    found = [str(problem) for problem in check_texts([DomainText("math", ("org/name", "t.parquet"))])]
    assert [("datasets" in line, "pyarrow" in line) for line in found] == [(True, False), (False, True)]
    assert all("pip install '.[train]'" in line for line in found)
    assert "no such file" in refused("missing.jsonl")


def test_first_records_are_looked_at_in_the_check(tmp_path):
    """Of several files, all in one report; what stands behind the first records is found when it is reached."""
    chat = json.dumps({"messages": [{"role": "user", "content": "x"}]})
    contents = {
        "a.jsonl": '{"body": "x"}\n',
        "b.json": "[1]",
        "c.csv": "id\n1\n",
        "d.jsonl": f"{chat}\n",
        "e.jsonl": '{"text": "x"}\n' * 3 + "{",
        "f.parquet": "none",
        "g.txt": "fine",
    }
    tokenizer = tmp_path / "tokenizer"
    tmp_path = tmp_path / "texts"
    tmp_path.mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    tiny_tokenizer().save_pretrained(tokenizer)
    data = (DomainText("code", (str(tmp_path), "gone.txt")), DomainText("math", (tmp_path / "a.jsonl",)))
    found = [str(problem) for problem in check_texts(data, tokenizer)]
    said = ["fields body", "a int", "fields id", "no chat template", "no Parquet", "no such file", "fields body"]
    assert len(found) == len(said)
    assert all(text in line for text, line in zip(said, found, strict=True)), found
    for name in ("additional_chat_templates/default.jinja", "chat_template.jinja", "chat_template.json"):
        (tokenizer / name).parent.mkdir(exist_ok=True)
        (tokenizer / name).write_text(TEMPLATE)
        assert check_texts([DomainText("chat", (tmp_path / "d.jsonl",))], tokenizer) == []
        (tokenizer / name).unlink()
    assert len(check_texts([DomainText("chat", (tmp_path / "d.jsonl",))], tokenizer)) == 1
    with_template = tiny_tokenizer()
    with_template.chat_template = TEMPLATE
    with_template.save_pretrained(tokenizer)
    assert check_texts([DomainText("chat", (tmp_path / "d.jsonl",))], tokenizer) == []


def test_domains_with_a_text_in_common_are_a_warning(tmp_path, monkeypatch):
    """By whatever path it is named; a router cannot learn from it which of them a token is of."""
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "link.txt").symlink_to("a.txt")
    monkeypatch.chdir(tmp_path)
    code, math = (
        DomainText("code", ("[ab].txt", "org/name")),
        DomainText("math", (str(tmp_path / "link.txt"), "b.txt")),
    )
    bio, law = DomainText("bio", ("c.txt",)), DomainText("law", ("org/name", "c.txt", "c.txt"))
    assert shared_text_warnings([code, bio]) == shared_text_warnings([math, law]) == []
    found = shared_text_warnings([code, math, bio, law])
    assert [(problem.source, problem.where) for problem in found] == [
        ("code, math", f"{tmp_path / 'a.txt'} and 1 more"),
        ("code, law", "org/name"),
        ("bio, law", str(tmp_path / "c.txt")),
    ]
    assert "the same text for several domains; expected a text of its own for each" in str(found[0])


def test_every_recipe_takes_texts_in_every_form(tmp_path):
    """By name or as DomainTexts; one reference, several, paths, with a weight."""
    given = {"code": "a.txt", "math": [tmp_path / "b.txt", "c.txt"], "bio": {"text": "d.txt", "weight": 2}}
    expected = (
        DomainText("code", ("a.txt",)),
        DomainText("math", (str(tmp_path / "b.txt"), "c.txt")),
        DomainText("bio", ("d.txt",), 2.0),
    )
    mixed = {**given, "code": DomainText("other", "a.txt")}
    listed = [DomainText("code", "a.txt"), DomainText("math", [tmp_path / "b.txt", "c.txt"]), expected[2]]
    for form in (given, expected, mixed, listed):
        assert TrainRecipe("m", form).data == expected
        assert FitRecipe("m", domain_text=form).domain_text == expected
        assert EditRecipe("m", drop=("x",), domain_text=form).domain_text == expected
        merge = MergeRecipe("s", dict.fromkeys(given, "e"), router_init="ridge", domain_text=form)
        assert tuple(merge.domain_text.values()) == expected


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (3, "3; expected `name: reference`"),
        ("a.txt", "'a.txt'; expected"),
        (["a.txt"], "['a.txt']; expected"),
        ([DomainText("code", "a"), DomainText("code", "b")], "code comes twice. Give one DomainText"),
        ({"code": 3}, "3; expected a reference"),
        ([DomainText("code", "a", 0)], "0; expected a number above 0"),
        ([DomainText("code", ())], "expected a reference"),
    ],
)
def test_texts_that_cannot_be_meant(wrong, said):
    for make in (lambda: TrainRecipe("m", wrong), lambda: FitRecipe("m", domain_text=wrong)):
        assert said in problems_of(make)[0]
    assert said in problems_of(lambda: EditRecipe("m", drop=("x",), domain_text=wrong))[0]
    assert said in problems_of(lambda: MergeRecipe("s", {"code": "e"}, router_init="ridge", domain_text=wrong))[0]


# Documents


def test_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"content": "four", "x": 1}\n"five"\n')
    (tmp_path / "c.json").write_text('[{"text": "six"}, "seven", {"text": "  "}]')
    (tmp_path / "d.csv").write_text('id,text\n1,"eight, and\nmore"\n2,nine\n')
    table = pyarrow.table({"text": [f"row {number}" for number in range(600)], "other": [0] * 600})
    pyarrow.parquet.write_table(table, tmp_path / "e.PARQUET")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/f.md").write_text("ten")
    (tmp_path / "script.py").write_text("no text")
    expected = ["one\n\ntwo\n", "three", "four", "five", "six", "seven", "eight, and\nmore", "nine"]
    expected += [f"row {number}" for number in range(600)]
    assert read(tmp_path) == [*expected, "ten"]
    assert read(f"{tmp_path}/*.[jc]s*") == expected[1:8]
    assert read(f"{tmp_path}/d.csv", f"{tmp_path}/a.txt") == [*expected[6:8], expected[0]]


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\r\n\r\ntwo\r\n"),
        ("a.md", "one\r\n\r\ntwo\r\n"),
        ("a.jsonl", '{"text": "one\\r\\n\\r\\ntwo\\r\\n"}\r\n'),
        ("a.json", '[{"text": "one\\r\\n\\r\\ntwo\\r\\n"}]'),
        ("a.csv", 'text\r\n"one\r\n\r\ntwo\r\n"\r\n'),
    ],
)
def test_what_windows_editors_save(tmp_path, name, content):
    """The mark of UTF-8 is no text, line ends stay; other encodings are refused with what converts them."""
    file = tmp_path / name
    file.write_bytes(MARK + content.encode())
    assert read(file) == ["one\r\n\r\ntwo\r\n"]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"):
        file.write_bytes(content.encode(encoding))
        line = refused(file)
        assert line.startswith(
            f"code: {file}: text in UTF-16 or UTF-32; expected text in UTF-8. Convert the file: `iconv"
        )


def test_a_large_text_keeps_its_line_ends_too(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "_WHOLE", 100)
    monkeypatch.setattr(textfiles, "_PART", 40)
    whole = "".join(f"{'word ' * 5}{number}\r\n\r\n" for number in range(20))
    (tmp_path / "a.txt").write_bytes(MARK + whole.encode())
    (tmp_path / "b.jsonl").write_bytes(MARK + b"\n" + MARK + b'{"text": "x"}\n')
    assert "".join(read(tmp_path / "a.txt")) == whole
    assert read(tmp_path / "b.jsonl") == ["x"]


def test_a_dataset_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names: str, **options: Any) -> Any:
        asked.append((names, options))
        return datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}, {"text": None}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = documents(DomainText("code", ("org/name/part@main",)))
    assert [next(stream), next(stream)] == ["one", "two"]
    assert asked == [(("org/name", "part"), {"split": "train", "streaming": True, "revision": "main"})]
    assert problems_of(next, stream)[0].startswith("code: org/name/part@main, record 3: the fields text (NoneType)")


def test_a_dataset_that_cannot_be_reached():
    line = refused("org/name-that-is-not-there")
    assert line.startswith("code: org/name-that-is-not-there: cannot be read (")
    assert "give files" in line


def test_large_plain_text_is_cut_between_paragraphs(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "_WHOLE", 100)
    monkeypatch.setattr(textfiles, "_PART", 40)
    paragraphs = "".join(f"{'word ' * 5}{number}\n\n" for number in range(20))
    whole = paragraphs + "x" * 350 + "\n\nend"
    (tmp_path / "large.txt").write_text(whole)
    parts = read(tmp_path / "large.txt")
    assert "".join(parts) == whole
    assert max(map(len, parts)) <= 140
    assert all(part.endswith("\n\n") for part in parts[:9])


def test_reading_is_lazy(tmp_path):
    """What stands before a broken line is given out; nothing after it was needed for that."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": \n')
    stream = documents(DomainText("code", (str(tmp_path / "a.jsonl"),)))
    assert next(stream) == "one"
    assert problems_of(next, stream)[0].startswith(f"code: {tmp_path}/a.jsonl, line 2: no JSON (Expecting value")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n[1]\n', ", line 2: a list; expected a JSON object or a string"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"body": "x", "n": 1}\n',
            ", line 3: the fields body (str), n (int); expected `text`",
        ),
        ("a.jsonl", b'{"text": 3}\n', ", line 1: the fields text (int); expected"),
        ("a.jsonl", b'{"text": "\xff"}\n', ", line 1: no JSON ('utf-8' codec can't decode byte 0xff"),
        ("a.json", b'[{"text": "x"}, {}]', ", record 2: the fields none; expected"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}', ": no JSON (Extra data"),
        ("a.csv", b"id,body\n1,x\n", ", line 2: the fields id (str), body (str); expected"),
        ("a.txt", b"caf\xe9 x", ": the byte 0xe9, which is no UTF-8; expected text in UTF-8. Convert the file."),
        ("a.csv", b'text\n"one\ntwo\n', ", after line 1: no CSV ("),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', ", line 1: \\ud83d, half of a surrogate pair, which is no character"),
        ("a.parquet", b"PAR1 no", ": no Parquet ("),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name).startswith(f"code: {tmp_path}/{name}{said}")


def test_a_parquet_file_that_is_broken_inside(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"] * 5000}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    assert refused(tmp_path / "a.parquet").startswith(f"code: {tmp_path}/a.parquet: no Parquet (")


def test_messages(tmp_path):
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    tokenizer = tiny_tokenizer()
    assert "no chat template" in refused(tmp_path / "a.jsonl", tokenizer=tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert read(tmp_path / "a.jsonl", tokenizer=tokenizer) == ["<s> user w1 w2 assistant w3</s>"]
    half = [{"role": "user", "content": "\ud83d"}]
    (tmp_path / "half.jsonl").write_text(json.dumps({"messages": half}) + "\n")
    assert "half of a surrogate pair" in refused(tmp_path / "half.jsonl", tokenizer=tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "does not take (TemplateError: roles must alternate)" in refused(tmp_path / "a.jsonl", tokenizer=tokenizer)
    table = pyarrow.table({"messages": [messages], "id": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    tokenizer.chat_template = TEMPLATE
    assert read(tmp_path / "b.parquet", tokenizer=tokenizer) == ["<s> user w1 w2 assistant w3</s>"]


# Windows


def test_windows():
    """Documents of 2, 7 and 1 words, each with its end: 3 + 8 + 2 tokens, in windows of 4."""
    end = 127
    given = ["w1 w2", "w3 w4 w5 w6 w7 w8 w9", "w10"]
    assert list(packed_windows(given, tiny_tokenizer(), 4)) == [
        ([1, 2, end, 3], [0, 1, 2, 0]),
        ([4, 5, 6, 7], [0, 1, 2, 3]),
        ([8, 9, end, 10], [0, 1, 2, 0]),
    ]
    assert list(packed_windows(given[:1], tiny_tokenizer(), 4)) == [([1, 2, end], [0, 1, 2])]
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert [ids for ids, _ in packed_windows(given, tokenizer, 5)] == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]


def test_special_tokens_are_not_doubled():
    """A template's own, beside those that the tokenizer gives each text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 126)])
    (one,) = packed_windows(["<s> w1 w2</s>", "w3"], tokenizer, 7)
    assert one == ([126, 1, 2, 127, 126, 3, 127], [0, 1, 2, 3, 0, 1, 2])


@pytest.mark.parametrize("given", [[], [""]])
def test_no_token_at_all(given):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    (line,) = problems_of(lambda: list(packed_windows(given, tokenizer, 4, "math")))
    assert line.startswith("math: text: not a single token")
