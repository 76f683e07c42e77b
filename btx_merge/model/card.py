"""Parts that every model card has: metadata, how to use the model, licence, citation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import metadata as package_metadata
from typing import Any
from urllib.parse import quote

import yaml

from btx_merge.reporting import counted
from btx_merge.sources.cards import card_texts, is_web_link
from btx_merge.sources.locate import Located

LICENCE_KEYS = ("license", "license_name", "license_link")
ROUTERS_TITLE = "## Routers"
UNTRAINED = "**They have not been trained yet**: fit or train them before you judge the model."
UNTRAINED_SENTENCE = re.compile(r" \*\*They have not been trained yet\*\*: [^.\n]*\.")
"""Finds it in a card, as this version or an earlier one wrote it."""
_PATH_COMMENT = "  # the folder of this model, or its id on the Hub"
_PATH_LINE = re.compile(rf'^path = "[^"\n]*"{re.escape(_PATH_COMMENT)}$', re.MULTILINE)
PAPER = "https://arxiv.org/abs/2403.07816"
CITATION_TITLE = "## Citation"
CITATION = f"""{CITATION_TITLE}

The method is Branch-Train-MiX:

```bibtex
@misc{{sukhbaatar2024branchtrainmix,
  title = {{Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM}},
  author = {{Sainbayar Sukhbaatar and Olga Golovneva and Vasu Sharma and Hu Xu and Xi Victoria Lin and
            Baptiste Rozi{{\\`e}}re and Jacob Kahn and Daniel Li and Wen-tau Yih and Jason Weston and Xian Li}},
  year = {{2024}},
  eprint = {{2403.07816}},
  archivePrefix = {{arXiv}},
  primaryClass = {{cs.CL}},
  url = {{{PAPER}}}
}}
```
"""


def with_metadata(metadata: Mapping[str, Any], body: str) -> str:
    """Return a card: the YAML block that the Hub reads, and the text."""
    return f"---\n{yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)}---\n{body}"


def project_link() -> str:
    """Return this package's name for a card, as a link to its home where the package's metadata name one."""
    urls = [str(url).partition(", ")[2] for url in package_metadata("btx-merge").get_all("Project-URL") or []]
    return f"[btx-merge]({urls[0]})" if urls else "btx-merge"


def how_to_use(arguments: str = "") -> str:
    """Write the card's section with code that runs. `arguments` go to every `from_pretrained`."""
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

{path_line(".")}
tokenizer = AutoTokenizer.from_pretrained(path{arguments})
model = AutoModelForCausalLM.from_pretrained(path{arguments}, dtype="auto")
inputs = tokenizer("The answer is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```
"""


def path_line(path: str) -> str:
    """Return the line of a card's code that says where the model lies."""
    return f'path = "{path}"{_PATH_COMMENT}'


def with_path(card: str, path: str) -> str:
    """Return a card whose code finds the model there: `.` for its own folder, `org/name` for a repository."""
    return _PATH_LINE.sub(lambda match: path_line(path), card)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---") -> str:
    """Return a table in Markdown; `rule` says how the columns behind the first are aligned."""
    lines = [head, ["---", *[rule] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def count(number: int) -> str:
    """Write a number of parameters as people do.

    >>> count(1_235_814_400)
    '1.24 B'
    """
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def sizes(parameters: int, active: int, per_token: int, experts: int) -> str:
    """Write the sizes of a model as its card gives them."""
    routed = f"per token ({per_token} of {counted(experts, 'expert')})"
    return f"{count(parameters)} parameters, {count(active)} of them active\n{routed}"


def hub_ids(given: Any) -> list[str]:
    """Return what can be an id on the Hub in a card's `base_model`, which is a name or a list of names."""
    candidates = given if isinstance(given, list) else [given]
    texts = [candidate for candidate in candidates if isinstance(candidate, str)]
    return [text for text in texts if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text)]


def take_over_terms(metadata: dict[str, Any], located: Located) -> None:
    """Add licence and languages of the model that a result is made of, as far as its card says them."""
    known = card_texts(located.folder)
    metadata |= {key: known[key] for key in (*LICENCE_KEYS, "language") if key in known}
    link_licence(metadata, located)


def link_licence(metadata: dict[str, Any], located: Located) -> None:
    """Link a licence that is a file beside the source's card, which is not copied; or leave the link out."""
    link = metadata.get("license_link")
    if not link or (isinstance(link, str) and is_web_link(link)):
        return
    del metadata["license_link"]
    is_file = isinstance(link, str) and re.fullmatch(r"[\w ./-]+", link) and ".." not in link.split("/")
    if located.repo_id and is_file:
        file = quote(link.removeprefix("./"))
        metadata["license_link"] = f"https://huggingface.co/{located.repo_id}/blob/{located.revision}/{file}"
