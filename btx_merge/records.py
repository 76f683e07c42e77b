"""The recipe in a file: one that a person wrote, or the record that a merged model carries of itself."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from btx_merge.hub import locate
from btx_merge.mergekit_moe import from_mergekit, is_mergekit
from btx_merge.texts import domain_texts_of
from btx_merge.yaml_files import read_yaml

RECIPE_FILE = "btx_recipe.yaml"
"""What a merge writes down of itself beside its result: a recipe with everything resolved."""
RECORDS = {"resolved": "", "fits": "fitted", "training": "trained", "edits": "edited", "shared_over": ""}
"""Keys of that file that are no recipe, and what they say was done to the model since."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def read_recipe_file(file: str | Path, on_note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Return the values of a recipe file, with the folders that it names relative to itself made absolute.

    A merged model's folder or Hub id stands for its own `btx_recipe.yaml`. That names folders and texts without their
    paths; they are looked for beside the model too.

    A file of mergekit-moe is translated (`mergekit_moe`).

    Args:
        on_note: called with how it was translated; or with what has become of the model since it was merged, which
            its recipe does not repeat.

    Raises:
        InputError: the file is missing, is no YAML or no mapping, or the Hub refuses.
    """
    path = Path(file)
    if _HUB_ID.fullmatch(str(file)) and not os.path.exists(file) and path.suffix not in (".yaml", ".yml"):
        path = locate("recipe", str(file), weights=False).folder / RECIPE_FILE
    path = path / RECIPE_FILE if os.path.isfile(path / RECIPE_FILE) else path
    roots = [path.parent, *([path.parent.parent] if path.name == RECIPE_FILE else [])]
    values = read_yaml(path, "recipe", "at least `seed:` and `experts:`")
    if is_mergekit(values):
        values = from_mergekit(values, str(file), on_note)
        roots.append(Path())  # mergekit sees folders from where it is called
    recorded = {key: values.pop(key, None) for key in RECORDS}
    since = [done for key, done in RECORDS.items() if done and recorded[key]]
    if since and on_note:
        on_note(f"{path}: the model was {' and '.join(since)} since it was merged; its recipe gives the merge alone.")

    values = anchor_sources(values, roots)
    if "domain_text" in values:
        texts = domain_texts_of(str(file), values["domain_text"], roots, "domain_text")
        values["domain_text"] = {text.name: text for text in texts}
    return values


def anchor_sources(values: Mapping[str, Any], roots: Sequence[Path]) -> dict[str, Any]:
    """Return a recipe's values with its sources' folders made absolute, seen from the first root where one is."""

    def anchored(reference: Any) -> Any:
        if not isinstance(reference, str):
            return reference
        # os.path's functions say no to a name that no file can have, where pathlib's raise
        beside = next((root / reference for root in roots if os.path.isdir(root / reference)), None)
        if beside is not None:
            return str(beside.resolve())
        is_relative = reference.startswith(("./", "../")) or reference in (".", "..")
        return os.path.abspath(roots[0] / reference) if is_relative else reference

    out = {**values, "seed": anchored(values.get("seed"))}
    if isinstance(experts := values.get("experts"), dict):
        out["experts"] = {
            name: {key: anchored(value) if key in ("model", "base") else value for key, value in spec.items()}
            if isinstance(spec, dict)
            else anchored(spec)
            for name, spec in experts.items()
        }
    return out
