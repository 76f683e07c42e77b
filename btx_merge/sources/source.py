"""One source of a merge: a config, a tokenizer's folder, and tensors that can be read by rows.

A source is a checkpoint, or a LoRA adapter over its base; from here on nobody needs to know which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from btx_merge.architectures.config_values import layer_problems, refuse_odd_values
from btx_merge.architectures.llama import EMBEDDING, HEAD, normalise_config
from btx_merge.checkpoints.dtypes import STORED, Float32, all_finite, to_float32
from btx_merge.checkpoints.stored import Lent, StoredTensor
from btx_merge.errors import InputError, NonFiniteError, Problem
from btx_merge.files.folder import read_json
from btx_merge.reporting import short
from btx_merge.sources.adapters.lora_delta import LoraDelta
from btx_merge.sources.cards import card_texts
from btx_merge.sources.locate import Located
from btx_merge.sources.tensors import read_tensors
from btx_merge.sources.tokenizer_files import TOKENIZER_FILES, has_tokenizer
from btx_merge.values import is_number, is_text, path_as_text, unknown_problems

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


SEED = "seed"
"""The name of the seed among the sources."""


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
    base_dtype: str | None = None
    """The dtype of the base, where peft merged an adapter into it in float32."""
    warnings: tuple[Problem, ...] = ()
    """What should be looked at twice, though the source can be merged."""

    @property
    def files(self) -> list[Path]:
        """Every file that the source's weights and shapes depend on."""
        if self.origin:
            return list(self.origin)
        files = {tensor.file for tensor in self.tensors.values()}
        for delta in self.deltas.values():
            files |= {delta.down.file, delta.up.file}
        for folder in self.folders:
            for name in ("config.json", "adapter_config.json", "generation_config.json", *TOKENIZER_FILES):
                if (folder / name).exists():
                    files.add(folder / name)
        return sorted(files)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Its own folder, and its base's behind it."""
        return (self.located.folder, self.base.folder) if self.base else (self.located.folder,)

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
        if self.base_dtype:
            return self.base_dtype
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def stored_name(self, name: str) -> str:
        """Return the tensor that holds `name`: for the head of a tied source, its embedding."""
        return EMBEDDING if name == HEAD and self.config["tie_word_embeddings"] else name

    def is_stored(self, name: str, dtype: str) -> bool:
        """Return whether the tensor's bytes are what the source means, in that dtype, so that they can be copied."""
        name = self.stored_name(name)
        return name not in self.deltas and self.tensors[name].dtype == dtype

    def stored_rows(self, name: str, start: int, stop: int, finite: bool = False) -> Lent:
        """Read rows [start, stop) as they are stored, of a tensor for which `is_stored` holds.

        Raises:
            NonFiniteError: `finite` is asked for and there is a NaN or an Inf.
        """
        tensor = self.tensors[self.stored_name(name)]
        raw = tensor.read_rows(start, stop)
        if finite and not all_finite(raw, tensor.dtype):
            self._report_nonfinite(tensor, to_float32(raw, tensor.dtype), start)
        return raw

    def rows(self, name: str, start: int, stop: int, finite: bool = False) -> Float32:
        """Read rows [start, stop) of a tensor in float32, with an adapter's delta added; exact otherwise.

        Raises:
            NonFiniteError: `finite` is asked for and there is a NaN or an Inf.
        """
        stored = self.stored_name(name)
        tensor = self.tensors[stored]
        raw = self.stored_rows(name, start, stop, finite)
        values = to_float32(raw, tensor.dtype).reshape(stop - start, *tensor.shape[1:])  # a copy: `raw` is only lent
        if stored in self.deltas:
            delta = self.deltas[stored]
            values += delta.rows(start, stop)
            if finite and not all_finite(values.reshape(-1).view(np.uint8), "F32"):
                self._report_nonfinite(delta.nonfinite_factor() or tensor, values, start)
        return values

    def _report_nonfinite(self, tensor: StoredTensor, values: Float32, start: int) -> None:
        flat = int(np.flatnonzero(~np.isfinite(values))[0])
        found = f"holds {values.reshape(-1)[flat]}"
        if tensor in self.tensors.values():  # otherwise it is a factor of an adapter, whose rows are others
            width = tensor.row_bytes // STORED[tensor.dtype].itemsize
            found += f" at row {start + flat // width}" + (f", column {flat % width}" if width > 1 else "")
        else:
            found = "holds NaN or Inf"
        raise NonFiniteError(
            f"{self.name}: {tensor.file.name}: {tensor.name} {found}. "
            "Repair or leave out this source; --allow-nonfinite goes on all the same."
        )

    def card_metadata(self) -> dict[str, str | list[str]]:
        """Return the strings of its README.md's metadata; empty where there are none that can be read."""
        return card_texts(self.located.folder)


def open_checkpoint(name: str, located: Located, weight: float) -> Source:
    """Open a folder with config.json and weights, without reading weights.

    Raises:
        InputError: it cannot be read, or is no Llama.
    """
    raw = read_json(located.folder / "config.json")
    _refuse_other_models(name, raw)
    refuse_odd_values(name, raw)
    config = normalise_config(raw)
    tensors = read_tensors(name, located.folder, tied=config["tie_word_embeddings"])
    if problems := list(layer_problems(name, config, tensors)):
        raise InputError(problems)
    return Source(name, located, config, raw, tensors, weight=weight)


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


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """One expert of the recipe."""

    model: str
    """A checkpoint or a PEFT adapter: a folder, `org/name` or `org/name@revision`."""
    weight: float = 1.0
    """Weight of an expert where sources are weighted, relative to the others'; a number, at least 0."""
    base: str | None = None
    """Model that an adapter was trained on, if not the seed."""


def as_spec(name: Any, spec: Any, key: str = "experts") -> ExpertSpec:
    """Make an expert of a recipe from plain values: a model, or a mapping with `model:`.

    Args:
        key: the mapping that it stands in, as errors name it.

    Raises:
        InputError: a name or a value that cannot be meant.
    """
    where = f"{key}.{name if isinstance(name, str) else short(name)}"
    if isinstance(spec, (str, Path)):
        spec = {"model": str(spec)}
    if isinstance(spec, ExpertSpec):
        spec = asdict(spec)
    if not isinstance(spec, Mapping):
        raise InputError([Problem("recipe", where, short(spec), "a model, or `model:` and `weight:`")])
    known = [item.name for item in fields(ExpertSpec)]
    problems = unknown_problems("recipe", spec, known, f"{where}.")
    values = {"weight": 1.0, "base": None, **{key: path_as_text(spec[key]) for key in known if key in spec}}
    if not values.get("model"):
        problems.append(Problem("recipe", where, "no model", "`model: folder or org/name`"))
    elif not is_text(values["model"]):
        problems.append(Problem("recipe", f"{where}.model", short(values["model"]), "a folder or org/name"))
    if not is_number(values["weight"]) or not 0 <= values["weight"] < math.inf:
        problems.append(Problem("recipe", f"{where}.weight", short(values["weight"]), "a number, at least 0"))
    if values["base"] is not None and not (values["base"] and is_text(values["base"])):
        problems.append(Problem("recipe", f"{where}.base", short(values["base"]), "a folder or org/name"))
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == SEED:
        expected = "letters, digits, `_`, `-`, `.`; not `seed`, which is the seed's own"
        problems.append(Problem("recipe", key, f"the name {short(name)}", expected))
    if problems:
        raise InputError(problems)
    return ExpertSpec(**values)
