"""The way from a recipe's references to open sources: each a checkpoint, or an adapter over its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from btx_merge.errors import InputError, Problem, collecting
from btx_merge.files.folder import file_problems, opening
from btx_merge.sources.adapters.opening import open_adapter
from btx_merge.sources.locate import SMALL_FILES, Located, locate
from btx_merge.sources.source import SEED, ExpertSpec, Source, open_checkpoint


def open_each(
    specs: Mapping[str, ExpertSpec], seed: Source | None, scratch: Callable[[], Path]
) -> tuple[dict[str, Source], list[Problem]]:
    """Open sources by name, without reading weights; return with them why others could not be opened.

    Args:
        seed: the base of adapters, where it is not itself the first of the sources.
        scratch: makes a folder for what peft has to merge itself (adapters that are not plain LoRA).
    """
    sources: dict[str, Source] = {}
    problems: list[Problem] = []
    for name, spec in specs.items():
        with collecting(problems), opening(name, spec.model):
            sources[name] = open_source(name, spec, sources.get(SEED, seed), scratch)
    return sources, problems


def open_source(name: str, spec: ExpertSpec, seed: Source | None, scratch: Callable[[], Path]) -> Source:
    """Open one source without reading weights. An adapter's base may be the seed.

    Raises:
        InputError: it is not there, cannot be read, is no Llama, or an adapter that does not fit its base.
    """
    located = _locate_checked(name, spec.model)
    if (located.folder / "adapter_config.json").exists():
        return open_adapter(name, spec, located, seed, scratch)
    if spec.base is not None:
        remedy = "Leave `base` out."
        raise InputError([Problem(name, "base", "given for a checkpoint", "only for an adapter", remedy)])
    _refuse_folder_of_models(name, located)
    return open_checkpoint(name, located, spec.weight)


def open_whole(name: str, reference: str) -> Source:
    """Open a source that must be a checkpoint, without reading weights.

    Raises:
        InputError: it is not there, cannot be read, is no Llama, or an adapter.
    """
    located = _locate_checked(name, reference)
    if (located.folder / "adapter_config.json").exists():
        remedy = "Merge it into its base first: peft's merge_and_unload, then save_pretrained."
        raise InputError([Problem(name, str(located.folder), "an adapter", "a whole model", remedy)])
    _refuse_folder_of_models(name, located)
    return open_checkpoint(name, located, 1.0)


def _locate_checked(name: str, reference: str) -> Located:
    """Locate a source whose small files may all be read."""
    located = locate(name, reference)
    if odd := list(file_problems(located.folder, SMALL_FILES)):
        raise InputError(odd)
    return located


def _refuse_folder_of_models(name: str, located: Located) -> None:
    """Refuse a folder that holds no model itself, but models or adapters in its own folders."""
    if (located.folder / "config.json").exists():
        return
    for kind, file in (("an adapter", "adapter_config.json"), ("a model", "config.json")):
        found = sorted(path.parent.name for path in located.folder.glob(f"*/{file}"))
        if found:
            remedy = f"Give {located.folder / found[0]}."
            expected = "a folder with config.json or adapter_config.json"
            where = str(located.folder)
            raise InputError([Problem(name, where, f"its subfolder {found[0]} holds {kind}", expected, remedy)])
