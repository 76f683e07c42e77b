"""Cards of sources and names of folders: nothing of them breaks a merge, costs time or means something in our card."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btx_merge import MergeRecipe, merge
from btx_merge.model.card import link_licence
from btx_merge.sources.cards import code_in_card, front_matter, in_card
from btx_merge.sources.locate import Located
from tests.conftest import Family
from tests.files.test_bounded_yaml import YAML_PARTS, bomb
from tests.merging.test_output import front_matter as written_metadata

HOSTILE = {
    "time": "license: !!timestamp x\n",
    "switch": "license: !!bool maybe\n",
    "date": "license: 2026-02-30\n",
    "deep": "license: " + "[" * 2000 + "\n",
    "recursive": "license: &a [*a]\n",
    "digits": f"license: {'9' * 5000}\n",
    "bomb of licences": bomb("license", 9),
    "bomb of models": bomb("base_model", 9),
    "bomb of languages": bomb("language", 9),
    "long": "license: [" + "a, " * 60_000 + "]\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_card_says_nothing(name: str, family: Family, tmp_path: Path) -> None:
    for source in ("seed", "code"):
        shutil.copytree(getattr(family, source), tmp_path / source)
        (tmp_path / source / "README.md").write_text(f"---\n{HOSTILE[name]}---\nText\n")
    began = time.perf_counter()
    merge(MergeRecipe(str(tmp_path / "seed"), {"code": str(tmp_path / "code")}), tmp_path / "out")
    assert time.perf_counter() - began < 10
    assert written_metadata(tmp_path / "out").keys() == {"library_name", "pipeline_tag", "tags"}


def test_only_strings_are_taken(family: Family, tmp_path: Path) -> None:
    card = "license: mit\nlicense_link: javascript://alert(1)\nlicense_name: {a: b}\nlanguage: [en, 5, [x], 'a\x01']\n"
    for source in ("seed", "code"):
        shutil.copytree(getattr(family, source), tmp_path / source)
        (tmp_path / source / "README.md").write_text(f"---\n{card}---\n".replace("\x01", "\\x01"))
    merge(MergeRecipe(str(tmp_path / "seed"), {"code": str(tmp_path / "code")}), tmp_path / "out")
    metadata = written_metadata(tmp_path / "out")
    assert metadata["license"] == "mit"
    assert metadata["language"][0] == "en"
    assert not {"license_link", "license_name"} & metadata.keys()


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("https://llama.com/license", "https://llama.com/license"),
        ("LICENSE", "https://huggingface.co/org/name/blob/c0de/LICENSE"),
        ("./USE POLICY.md", "https://huggingface.co/org/name/blob/c0de/USE%20POLICY.md"),
        ("javascript://alert(1)", None),
        ("javascript:alert(1)", None),
        ("data:text/html,x", None),
        ("https://x\n# Injected", None),
        ("../../../evil", None),
        (["LICENSE"], None),
    ],
)
def test_links_of_licences(link: object, expected: str | None) -> None:
    metadata = {"license_link": link}
    link_licence(metadata, Located(Path(), "org/name", "c0de"))
    assert metadata.get("license_link") == expected


@pytest.mark.parametrize("name", ["nl\n# Injected <img src=x onerror=alert(1)>", "a`b|c", "x](y)[z", "caf\udce9"])
def test_a_folder_of_any_name_stays_in_its_cell(name: str, family: Family, tmp_path: Path) -> None:
    shutil.copytree(family.seed, tmp_path / name)
    merge(MergeRecipe(str(tmp_path / name), {"code": str(family.code)}), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 2
    assert rows[0].count("|") == 5
    assert not {"`", "<img", "[z", "# "} & {part for part in ("`", "<img", "[z", "# ") if part in rows[0]}
    assert "\n# Injected" not in text


@given(st.text(max_size=30))
def test_any_name_means_nothing(name: str) -> None:
    for shown in (in_card(name), code_in_card(name)):
        assert "\n" not in shown
        assert "|" not in shown
        assert not set("<>`[]*") & set(shown.replace("<code>", "").replace("</code>", "").strip("`"))


@given(st.lists(YAML_PARTS | st.text(max_size=6), max_size=20))
def test_any_front_matter_is_read_or_left(parts: list[str]) -> None:
    text = "---\n" + "".join(parts) + "\n---\nText"
    metadata, body = front_matter(text)
    assert isinstance(metadata, dict)
    assert text.endswith(body)
