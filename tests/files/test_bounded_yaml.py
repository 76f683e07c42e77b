"""YAML of others: whatever it holds, an answer or one bounded InputError, and that soon."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from btx_merge import InputError, MergeRecipe
from btx_merge.cli.training import read_train_file
from btx_merge.files.bounded_yaml import parse_yaml
from btx_merge.merging.recipe_file import read_recipe_file


def bomb(key: str, levels: int) -> str:
    """Nine lines that stand for nine to the power of nine values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"{key}: *a{levels - 1}", ""])


HOSTILE = {
    "a date that there is not": "random_seed: 2026-02-30\n",
    "no number": "random_seed: !!int x\n",
    "no float": "scale: !!float x\n",
    "no switch": "untie: !!bool maybe\n",
    "no time": "seed: !!timestamp x\n",
    "no bytes": "seed: !!binary x\n",
    "a float of points": "scale: !!float ._\n",
    "no letter": 'seed: "\\UFFFFFFFF"\n',
    "deep lists": "seed: " + "[" * 2000 + "\n",
    "deep mappings": "seed: " + "{a: " * 2000 + "\n",
    "deep blocks": "\n".join(" " * n + "a:" for n in range(500)),
    "many digits": f"scale: {'9' * 5000}\n",
    "many digits of base 16": f"scale: 0x{'f' * 20_000}\n",
    "many digits of base 60": f"scale: 1{':59' * 100_000}\n",
    "aliases that expand": bomb("combine", 9),
    "an alias inside of itself": "seed: &a [*a]\n",
    "an alias of a mapping inside of itself": "seed: &a {b: *a}\n",
    "merge keys that expand": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9)),
    "too large a file": "#" * 2_000_001,
    "too many values": "x: [" + "a," * 120_000 + "]\n",
    "an anchor that there is not": "seed: *nowhere\n",
    "a null byte": "seed: a\0b\n",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("read", [read_recipe_file, read_train_file])
def test_hostile_files(name: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(HOSTILE[name])
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        read(file)
    (problem,) = caught.value.problems
    assert problem.where == str(file)
    assert len(str(problem)) < 1000
    assert "\n" not in str(problem)
    assert time.process_time() - began < 60


def test_an_error_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text("seed: org/s\nrandom_seed: 2026-02-30\n")
    with pytest.raises(InputError) as caught:
        read_recipe_file(tmp_path / "merge.yaml")
    assert "2026-02-30 cannot be read as timestamp in" in str(caught.value)
    assert "line 2, column 14" in str(caught.value)
    assert "unicode string" not in str(caught.value)


def test_aliases_that_do_not_expand_are_taken() -> None:
    """PyYAML writes them itself for what stands at two places, as in the record of an edit."""
    spec = {"model": "org/a", "weight": 1.0}
    text = yaml.safe_dump({"experts": {"a": spec}, "shared_over": {"experts": {"a": spec}}})
    assert "&id001" in text
    assert parse_yaml(text) == yaml.safe_load(text)


def test_twenty_thousand_experts(tmp_path: Path) -> None:
    lines = "".join(f"  e{n}: org/model-{n}\n" for n in range(20_000))
    (tmp_path / "merge.yaml").write_text(f"seed: org/s\nexperts:\n{lines}")
    began = time.process_time()
    assert len(MergeRecipe.from_yaml(tmp_path / "merge.yaml").experts) == 20_000
    assert time.process_time() - began < 60


def test_thousands_of_unknown_keys_are_counted() -> None:
    with pytest.raises(InputError) as caught:
        MergeRecipe.from_dict({"seed": "s", "experts": {"a": "b"}, **{f"key{n}": n for n in range(5000)}})
    assert len(caught.value.problems) == 21
    assert str(caught.value.problems[-1]) == "recipe: 4,980 more keys: unknown"


def taken(read: Callable[[Any], Any], value: Any) -> Any:
    """What a function makes of a value; None where it refuses it, by an InputError of a bounded size."""
    try:
        return read(value)
    except InputError as error:
        if len(str(error)) > 100_000:
            raise
        return None


KEYS = st.sampled_from(list(MergeRecipe.__dataclass_fields__))
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 3).map(lambda n: (10**400, -(10**5000), 2**63, 0)[n])  # hypothesis shows what it samples from
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\ud800", "a\0b", "x" * 5000, "../x", "5GB", "9" * 400 + "GB", "mean", "ridge", "seed"])
    | st.binary(max_size=5)
    | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner)
        | st.dictionaries(
            st.text(max_size=5) | st.integers() | st.just("text") | st.just(5).map(lambda n: 10 ** (1000 * n)), inner
        )
    ),
    max_leaves=8,
)
ROOM = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ROOM
@given(st.dictionaries(KEYS, PLAIN, max_size=6))
def test_any_plain_value_is_taken_or_refused(values: dict[str, Any]) -> None:
    for given_values in (values, {"seed": "s", "experts": {"a": "b"}, **values}):
        recipe = taken(MergeRecipe.from_dict, given_values)
        assert recipe is None or MergeRecipe.from_dict(recipe.to_dict()) == recipe


YAML_PARTS = st.sampled_from(
    [
        *(
            "seed: ",
            "experts: ",
            "  a: ",
            "\n",
            "- ",
            "[",
            "]",
            "{",
            "}",
            "&a ",
            "*a",
            "<<: ",
            "!!int ",
            "!!timestamp ",
        ),
        *("!!set ", "!!omap ", "!!binary ", "'", '"', "\\", "|", ">", "? ", ": ", "# ", "%YAML 1.1\n", "---\n"),
        *("...\n", "2026-02-30", "0x", "1:00", ".inf", "1e9", "~", "org/a", "domain_text: ", "prompts: "),
        *("combine: ", "9" * 200, "\t", ",", "\ufeff"),
    ]
)


@ROOM
@given(st.lists(YAML_PARTS | st.text(max_size=6), max_size=30))
def test_any_text_is_read_or_refused(tmp_path: Path, parts: list[str]) -> None:
    file = tmp_path / "merge.yaml"
    file.write_bytes("".join(parts).encode("utf-8", "surrogatepass"))
    for read in (read_recipe_file, MergeRecipe.from_yaml, read_train_file):
        taken(read, file)
