"""One source of a merge: a config, a tokenizer's folder, and tensors that can be read by rows.

A source is a checkpoint, or a LoRA adapter over its base; from here on nobody needs to know which.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from btx_merge.adapter import LoraDelta, is_plain_lora, merge_through_peft, split_adapter
from btx_merge.dtypes import STORED, Float32, Raw, all_finite, to_float32
from btx_merge.errors import InputError, NonFiniteError, Problem
from btx_merge.hub import Located, locate
from btx_merge.llama import DEFAULTS, EMBEDDING, HEAD, normalise_config
from btx_merge.recipe import SEED, ExpertSpec, MergeRecipe
from btx_merge.tensorfiles import StoredTensor, read_tensor_file
from btx_merge.tokenizer_files import TOKENIZER_FILES, has_tokenizer

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_SAVED_EMBEDDINGS = ("embed_tokens.weight", "embed_tokens.base_layer.weight")
_SAVE_AGAIN = "Save it again with save_pretrained, or download it again."
_COPY_THE_REST = "Give another folder, or copy the missing file there."
_IS_IT_ITS_BASE = "Was it trained on this model? `base:` in the recipe names another."
_UNTIE_ADAPTER = "Merge it with peft, untie the result, save it, and give that folder."
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)


@dataclass(frozen=True, eq=False)
class Source:
    """A model as the merge sees it."""

    name: str
    located: Located
    config: Mapping[str, Any]
    """Normalised (`llama.normalise_config`), with `vocab_size` as the embedding has it."""
    raw_config: Mapping[str, Any]
    """config.json as it lies."""
    tensors: Mapping[str, StoredTensor]
    """By the base's names. Where an adapter replaces a tensor, the adapter's."""
    deltas: Mapping[str, LoraDelta] = field(default_factory=dict)
    base: Located | None = None
    """What an adapter was applied to."""
    weight: float = 1.0
    origin: tuple[Path, ...] = ()
    """The files that a source was made from where its tensors lie in a temporary folder."""

    @property
    def files(self) -> list[Path]:
        """Every file that the source's weights and shapes depend on."""
        if self.origin:
            return list(self.origin)
        factors = [factor for delta in self.deltas.values() for factor in (delta.down, delta.up)]
        folders = [self.located.folder, *([self.base.folder] if self.base else [])]
        names = ("config.json", "adapter_config.json", "generation_config.json", *TOKENIZER_FILES)
        small = [folder / name for folder in folders for name in names if (folder / name).exists()]
        return sorted({tensor.file for tensor in (*self.tensors.values(), *factors)} | set(small))

    @property
    def folders(self) -> tuple[Path, ...]:
        """Its own folder, and its base's behind it."""
        return (self.located.folder, *([self.base.folder] if self.base else []))

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where its tokenizer lies: its own, or its base's; None where neither has one."""
        for folder in self.folders:
            if has_tokenizer(folder):
                return folder
        return None

    @property
    def dtype(self) -> str:
        """safetensors' name of the dtype that most of its bytes have."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def stored_name(self, name: str) -> str:
        """The tensor that holds `name`: for the head of a tied source, its embedding."""
        return EMBEDDING if name == HEAD and self.config["tie_word_embeddings"] else name

    def is_stored(self, name: str, dtype: str) -> bool:
        """Whether the tensor's bytes are what the source means, in that dtype, so that they can be copied."""
        name = self.stored_name(name)
        return name not in self.deltas and self.tensors[name].dtype == dtype

    def stored_rows(self, name: str, start: int, stop: int, finite: bool = False) -> Raw:
        """Rows [start, stop) as they are stored, for tensors for which `is_stored` holds."""
        tensor = self.tensors[self.stored_name(name)]
        raw = tensor.read_rows(start, stop)
        if finite and not all_finite(raw, tensor.dtype):
            self._report_nonfinite(tensor, to_float32(raw, tensor.dtype), start)
        return raw

    def rows(self, name: str, start: int, stop: int, finite: bool = False) -> Float32:
        """Rows [start, stop) of a tensor in float32, with an adapter's delta added; exact otherwise.

        Raises:
            NonFiniteError: `finite` is asked for and there is a NaN or an Inf.
        """
        stored = self.stored_name(name)
        tensor = self.tensors[stored]
        raw = self.stored_rows(name, start, stop, finite)
        values = to_float32(raw, tensor.dtype).reshape(stop - start, *tensor.shape[1:])
        if stored in self.deltas:
            delta = self.deltas[stored]
            values += delta.rows(start, stop)
            if finite and not all_finite(values.reshape(-1).view(np.uint8), "F32"):
                self._report_nonfinite(delta.nonfinite_factor() or tensor, values, start)
        return values

    def _report_nonfinite(self, tensor: StoredTensor, values: Float32, start: int) -> None:
        flat = int(np.flatnonzero(~np.isfinite(values))[0])
        found = f"holds {values.reshape(-1)[flat]}"
        if tensor in self.tensors.values():
            width = tensor.row_bytes // STORED[tensor.dtype].itemsize
            found += f" at row {start + flat // width}" + (f", column {flat % width}" if width > 1 else "")
        else:
            found = "holds NaN or Inf"
        raise NonFiniteError(
            f"{self.name}: {tensor.file.name}: {tensor.name} {found}. "
            "Repair or leave out this source; --allow-nonfinite goes on all the same."
        )

    def card_metadata(self) -> dict[str, Any]:
        """The YAML front matter of its README.md; empty where there is none that can be read."""
        try:
            return front_matter((self.located.folder / "README.md").read_text(encoding="utf-8"))[0]
        except (OSError, ValueError):  # no UTF-8
            return {}


def front_matter(text: str) -> tuple[dict[str, Any], str]:
    """A model card's metadata, empty where they cannot be read, and the text behind them."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n?", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except (ValueError, yaml.YAMLError):  # ValueError: a date that does not exist
        metadata = None
    return (metadata, text[match.end() :]) if match and isinstance(metadata, dict) else ({}, text)


def open_sources(recipe: MergeRecipe, scratch: Callable[[], Path]) -> tuple[list[Source], list[Problem]]:
    """The seed, then the experts in the recipe's order, opened without reading weights; and why others were not.

    `scratch` makes a folder for what peft has to merge itself (adapters that are not plain LoRA).
    """
    seed, problems = open_each({SEED: ExpertSpec(recipe.seed, recipe.seed_weight)}, None, scratch)
    experts, more = open_each(recipe.experts, seed.get(SEED), scratch)
    return [*seed.values(), *experts.values()], [*problems, *more]


def open_each(
    specs: Mapping[str, ExpertSpec], seed: Source | None, scratch: Callable[[], Path]
) -> tuple[dict[str, Source], list[Problem]]:
    """Sources by name, opened without reading weights; and why others were not."""
    sources: dict[str, Source] = {}
    problems: list[Problem] = []
    for name, spec in specs.items():
        try:
            sources[name] = open_source(name, spec, seed, scratch)
        except InputError as error:
            problems += [replace(problem, source=name) for problem in error.problems]
    return sources, problems


def open_source(name: str, spec: ExpertSpec, seed: Source | None, scratch: Callable[[], Path]) -> Source:
    """One source, opened without reading weights. An adapter's base is the seed where its config agrees.

    Raises:
        InputError: it is not there, cannot be read, is no Llama, or an adapter that does not fit its base.
    """
    located = locate(name, spec.model)
    if not (located.folder / "adapter_config.json").exists():
        if spec.base is not None:
            remedy = "Leave `base` out."
            raise InputError([Problem(name, "base", "given for a checkpoint", "only for an adapter", remedy)])
        return _open_checkpoint(name, located, spec.weight)
    config = read_json(located.folder / "adapter_config.json")
    file = _first_existing(located.folder, _ADAPTER_FILES)
    if file is None:
        expected = " or ".join(_ADAPTER_FILES)
        raise InputError([Problem(name, str(located.folder), "no weights", expected, _COPY_THE_REST)])
    base = _adapter_base(name, config, spec.base, seed)
    stored = read_tensor_file(file)
    if not is_plain_lora(config):
        rows = next((t.shape[0] for key, t in stored.items() if key.endswith(_SAVED_EMBEDDINGS)), None)
        merged = merge_through_peft(name, base.located.folder, located.folder, scratch(), rows)
        source = _open_checkpoint(name, Located(merged), spec.weight)
        origin = (located.folder / "adapter_config.json", file, *base.files)
        return replace(source, located=located, base=base.located, origin=origin)
    deltas, replaced = split_adapter(config, stored)
    tensors = {**base.tensors, **replaced}
    _check_fit(name, file, base, deltas, replaced, tensors)
    source = replace(base, name=name, located=located, tensors=tensors, deltas=deltas, base=base.located)
    vocab_size = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else base.config["vocab_size"]
    return replace(source, config={**base.config, "vocab_size": vocab_size}, weight=spec.weight)


def _adapter_base(name: str, config: Mapping[str, Any], given: str | None, seed: Source | None) -> Source:
    """The model under an adapter: the recipe's, otherwise the seed where the adapter's config agrees."""
    recorded = config.get("base_model_name_or_path")
    if not isinstance(recorded, str | None):
        found = f"base_model_name_or_path is {recorded!r}"
        remedy = "Correct it, or give `base:` in the recipe."
        raise InputError([Problem(name, "adapter_config.json", found, "a folder or a Hub id", remedy)])
    if given is None and seed is not None and seed.base is None:
        names = {seed.located.public_name, str(seed.located.folder), str(seed.located.folder.resolve())}
        if not recorded or recorded in names or Path(recorded).name == Path(seed.located.public_name).name:
            return seed
    reference = given or recorded
    if not reference:
        raise InputError([Problem(name, "adapter_config.json", "names no base", "", "Give `base:` in the recipe.")])
    if not given and config.get("revision") and not Path(reference).is_dir():
        reference += f"@{config['revision']}"
    try:
        return _open_checkpoint(name, locate(name, reference), 1.0)
    except InputError as error:
        remedy = "If it was trained on the seed, say `base:` with the seed's own reference in the recipe."
        found = f"the adapter's base {reference} is not the seed"
        raise InputError([Problem(name, "adapter_config.json", found, "", remedy), *error.problems]) from error


def _check_fit(
    name: str,
    file: Path,
    base: Source,
    deltas: Mapping[str, LoraDelta],
    replaced: Mapping[str, StoredTensor],
    tensors: Mapping[str, StoredTensor],
) -> None:
    problems = []
    for key in sorted({*deltas, *replaced} - set(base.tensors)):
        if key == HEAD and base.config["tie_word_embeddings"]:
            if HEAD not in deltas and EMBEDDING in replaced:
                continue  # peft saves both after a resize; that they are one is for the checks
            problems.append(Problem(name, file.name, f"changes {HEAD}, which its base ties", "", _UNTIE_ADAPTER))
        else:
            problems.append(
                Problem(name, file.name, f"changes {key}, which its base does not have", "", _IS_IT_ITS_BASE)
            )
    alone = EMBEDDING in replaced and EMBEDDING not in deltas and HEAD not in {*deltas, *replaced}
    if alone and base.config["tie_word_embeddings"]:
        found = f"replaces {EMBEDDING}, but not {HEAD}, which its base ties to it"
        problems.append(Problem(name, file.name, found, "", _UNTIE_ADAPTER))
    for key, delta in deltas.items():
        if key in tensors and tensors[key].shape != delta.shape:
            found, expected = f"the delta of {key} is {list(delta.shape)}", f"{list(tensors[key].shape)}"
            problems.append(Problem(name, file.name, found, expected, _IS_IT_ITS_BASE))
    if problems:
        raise InputError(problems)


def _open_checkpoint(name: str, located: Located, weight: float) -> Source:
    raw = read_json(located.folder / "config.json")
    _refuse_other_models(name, raw)
    refuse_odd_values(name, raw)
    tensors = read_tensors(name, located.folder)
    return Source(name, located, normalise_config(raw), raw, tensors, weight=weight)


def _refuse_other_models(name: str, raw: Mapping[str, Any]) -> None:
    problems = []
    if raw.get("model_type") != "llama":
        remedy = "Only Llama checkpoints can be merged."
        if raw.get("model_type") == "btx":
            remedy = "This is a merged model already: btx extract takes an expert out, btx edit changes its experts."
        found = f"model_type is {raw.get('model_type')!r}"
        problems.append(Problem(name, "config.json", found, "'llama'", remedy))
    if raw.get("quantization_config") is not None:
        quantisation = raw["quantization_config"]
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        remedy = "Load it in transformers, call model.dequantize(), save_pretrained, and give that folder."
        problems.append(Problem(name, "config.json", f"a quantised checkpoint ({method})", "plain weights", remedy))
    if problems:
        raise InputError(problems)


def refuse_odd_values(name: str, raw: Mapping[str, Any]) -> None:
    """Values that no Llama can have; what the config leaves out has a default.

    Raises:
        InputError: all of them.
    """
    problems = []
    for key, value in raw.items():
        if key in _SIZES:
            fine, expected = type(value) is int and value > 0, "a whole number above 0"
        elif key in _SWITCHES:
            fine, expected = isinstance(value, bool), "true or false"
        elif key in ("rope_scaling", "rope_parameters"):
            fine, expected = isinstance(value, dict | None), "an object"
        elif key in ("rms_norm_eps", "rope_theta", "initializer_range"):
            fine, expected = type(value) in (int, float), "a number"
        else:
            continue
        if not fine and not (value is None and DEFAULTS.get(key, 0) is None):
            problems.append(Problem(name, f"config.json: {key}", json.dumps(value), expected, _SAVE_AGAIN))
    if problems:
        raise InputError(problems)


def read_tensors(name: str, folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, from one file or from the shards that its index names.

    Raises:
        InputError: every file that is missing, cannot be read, or does not agree with the index.
    """
    single = _first_existing(folder, _SINGLE_FILES)
    index = _first_existing(folder, _INDEXES)
    if single is not None and (index is None or single.suffix == ".safetensors"):
        return read_tensor_file(single)
    if index is None:
        expected = f"{' or '.join(_SINGLE_FILES)}, or shards with their index"
        raise InputError([Problem(name, str(folder), "no weights", expected, _COPY_THE_REST)])
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError([Problem(name, index.name, "no weight_map", "tensor name to file name", _SAVE_AGAIN)])
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in ("", ".."):
            found = f"points outside its folder, to {shard}"
            problems.append(Problem(name, index.name, found, "file names", "Do not use this checkpoint as it is."))
            continue
        if not (folder / shard).exists():
            remedy = "Download or copy the missing file."
            problems.append(Problem(name, shard, "missing", f"beside {index.name}, which names it", remedy))
            continue
        try:
            found_here = read_tensor_file(folder / shard)
        except InputError as error:
            problems += error.problems
            continue
        for key in sorted(found_here.keys() & tensors.keys()):
            found = f"{key} stands there and in {tensors[key].file.name}"
            problems.append(Problem(name, shard, found, "once", _SAVE_AGAIN))
        for key in sorted(key for key, file in weight_map.items() if file == shard and key not in found_here):
            problems.append(Problem(name, shard, f"lacks {key}", f"it there, by {index.name}", _SAVE_AGAIN))
        tensors |= found_here
    if problems:
        raise InputError(problems)
    return tensors


def _first_existing(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a source.

    Raises:
        InputError: the file is missing, is no JSON or no object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        found = "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
        expected = "a folder saved by save_pretrained"
        raise InputError([Problem("", str(file), found, expected, _COPY_THE_REST)]) from error
    except (ValueError, RecursionError) as error:
        raise InputError([Problem("", str(file), f"not JSON: {error}", "a JSON object", _SAVE_AGAIN)]) from error
    if not isinstance(values, dict):
        raise InputError([Problem("", str(file), "not a JSON object", "one", _SAVE_AGAIN)])
    return values
