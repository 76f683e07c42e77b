"""Small files that a result takes over: they are read last, so they are looked at first."""

from __future__ import annotations

from pathlib import Path

from btx_merge.architectures.loading_rules import generation_refusals
from btx_merge.errors import Problem, collecting
from btx_merge.files.folder import read_json

_GENERATION = "generation_config.json"


def side_file_problems(name: str, *folders: Path) -> list[Problem]:
    """Return which small files of a model cannot be read, and what of its generation config transformers refuses.

    Args:
        name: the model's, for the problems.
        folders: an adapter's own and its base's.
    """
    problems: list[Problem] = []
    for folder in folders:
        for file in (_GENERATION, "tokenizer_config.json", "special_tokens_map.json"):
            with collecting(problems, name):
                if (folder / file).exists():
                    values = read_json(folder / file)
                    problems += generation_refusals(name, file, values) if file == _GENERATION else ()
    return problems
