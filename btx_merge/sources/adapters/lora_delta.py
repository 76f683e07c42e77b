"""A LoRA adapter as an overlay on its base, added row by row while a merge streams.

Plain LoRA (Hu et al., arXiv 2106.09685) and rsLoRA are computed here, row by row: W + s B A, in float32.
Everything else that peft knows is merged by peft itself (`through_peft`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from btx_merge.checkpoints.dtypes import STORED, Float32, all_finite, to_float32
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.errors import InputError, Problem
from btx_merge.sources.adapters.targets import Matches, by_key

# Keys of adapter_config.json that plain LoRA may set. Any other key with a value means something that
# this module does not compute.
_PLAIN_KEYS = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    ]
)
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_PREFIX = "base_model.model."
SAVE_AGAIN = "Save the adapter again with peft's save_pretrained."
_SINGLE_THREADED = 4 * 65536
"""Multiplications up to which OpenBLAS starts no thread: its GEMM_MULTITHREAD_THRESHOLD of 4, times 65,536."""


def is_plain_lora(config: Mapping[str, Any]) -> bool:
    """Return whether the adapter is a LoRA whose delta is s B A and nothing more."""
    if config.get("peft_type") != "LORA" or config.get("init_lora_weights", True) not in _PLAIN_INITS:
        return False
    return not any(value for key, value in config.items() if key not in _PLAIN_KEYS | {"init_lora_weights"})


@dataclass(frozen=True)
class LoraDelta:
    """The low-rank difference of one weight: rows of `scaling * B A`."""

    down: StoredTensor
    """A, [rank, in]; of an embedding [rank, V]."""
    up: StoredTensor
    """B, [out, rank]; of an embedding [H, rank]."""
    scaling: float
    """s, by which the product is multiplied."""
    embedding: bool = False
    """Whether the weight is an embedding, whose factors stand the other way round."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that the delta belongs to."""
        if self.embedding:
            return (self.down.shape[1], self.up.shape[0])
        return (self.up.shape[0], self.down.shape[1])

    def rows(self, start: int, stop: int) -> Float32:
        """Compute rows [start, stop) of the delta, s B[start:stop] A, in float32."""
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf are found and named by who asks
            if self.embedding:  # its factors stand the other way round: the delta is s (B A)^T
                return self.scaling * _product(_whole(self.down)[:, start:stop].T, _whole(self.up).T)
            # rows of W + s B A need the same rows of B, and all of A, which is small
            up = to_float32(self.up.read_rows(start, stop), self.up.dtype).reshape(stop - start, -1)
            return self.scaling * _product(up, _whole(self.down))

    def nonfinite_factor(self) -> StoredTensor | None:
        """Return the factor that holds a NaN or an Inf, if one does."""
        for factor in (self.down, self.up):
            if not all_finite(factor.read_rows(0, factor.shape[0]), factor.dtype):
                return factor
        return None


def _product(left: Float32, right: Float32) -> Float32:
    """Multiply left @ right in tiles that OpenBLAS, numpy's own, leaves to the calling thread.

    For larger products it starts threads, which fight with the writer's: ten times slower in all.
    """
    rows, rank = left.shape
    # columns of a tile: rows * rank * columns multiplications
    columns = max(1, _SINGLE_THREADED // (rows * rank))
    out = np.empty((rows, right.shape[1]), np.float32)
    for start in range(0, right.shape[1], columns):
        np.matmul(left, right[:, start : start + columns], out=out[:, start : start + columns])
    return out


@functools.lru_cache(maxsize=8)
def _whole(tensor: StoredTensor) -> Float32:
    """Read a small factor in float32 and keep it: the next rows need it again."""
    return to_float32(tensor.read_rows(0, tensor.shape[0]), tensor.dtype).reshape(tensor.shape)


def split_adapter(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], matches: Matches
) -> tuple[dict[str, LoraDelta], dict[str, StoredTensor]]:
    """Split the adapter's tensors into deltas on the base's and tensors that replace the base's.

    Raises:
        InputError: half a pair is missing, or a tensor is none of plain LoRA's.
    """
    _whole.cache_clear()  # the file may be another one than at the last merge of this process
    factors: dict[str, dict[str, StoredTensor]] = {}  # by module: "A" and "B", or "embedding_A" and "embedding_B"
    replaced: dict[str, StoredTensor] = {}
    problems = []
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if ".original_module." in name:
            continue  # of a resized embedding, before it was trained under modules_to_save
        # "layers.0.self_attn.q_proj.lora_A.weight", "embed_tokens.lora_embedding_B"
        match = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", name)
        if match:
            factors.setdefault(match[1], {})[(match[2] or "") + match[3]] = tensor
        elif ".lora_" in name or not name.endswith((".weight", ".bias")):
            found = f"tensor {key}, which plain LoRA does not have"
            problems.append(Problem("", tensor.file.name, found, "lora_A, lora_B and whole weights", SAVE_AGAIN))
        else:
            # modules_to_save, trained biases, and the resized embedding that peft saves under its adapter
            replaced[re.sub(r"\.(base_layer|modules_to_save)\.", ".", name)] = tensor
    deltas = {}
    for module, parts in factors.items():
        embedding = "embedding_A" in parts
        if odd := [part for part in parts.values() if part.dtype not in STORED]:
            found, expected = f"{odd[0].name} has dtype {odd[0].dtype}", f"one of {', '.join(STORED)}"
            problems.append(Problem("", odd[0].file.name, found, expected, SAVE_AGAIN))
            continue
        prefix = "embedding_" if embedding else ""
        down, up = parts.get(f"{prefix}A"), parts.get(f"{prefix}B")
        # A [rank, in] and B [out, rank] must be there, be matrices, and have one rank
        rank = down.shape[0] if down and len(down.shape) == 2 else None
        if down is None or up is None or len(up.shape) != 2 or rank != up.shape[1] or not rank:
            shapes = [f"lora_{part} {list(tensor.shape)}" for part, tensor in parts.items()]
            found = f"{module} has {', '.join(shapes)}"
            file = next(iter(parts.values())).file.name
            problems.append(Problem("", file, found, "lora_A [r, in] and lora_B [out, r]", SAVE_AGAIN))
            continue
        try:
            scaling = _scaling(config, module, rank, matches)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            found = f"lora_alpha or alpha_pattern cannot be understood for {module} ({error})"
            raise InputError([Problem("", "adapter_config.json", found, "numbers", SAVE_AGAIN)]) from error
        deltas[f"{module}.weight"] = LoraDelta(down, up, scaling, embedding)
    if problems:
        raise InputError(problems)
    return deltas, replaced


def _scaling(config: Mapping[str, Any], module: str, rank: int, matches: Matches) -> float:
    """Return s: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732). The first pattern that matches counts."""
    alpha = float(config.get("lora_alpha", 8))
    for key, value in (config.get("alpha_pattern") or {}).items():
        if module in matches.of(by_key(key)):
            alpha = float(value)
            break
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def same_delta(embedding: LoraDelta, head: LoraDelta) -> bool:
    """Return whether an embedding's delta and a head's are one, whose factors then stand the other way round."""
    if embedding.shape != head.shape or embedding.scaling != head.scaling or not embedding.embedding:
        return False
    down, up = _whole(embedding.down), _whole(embedding.up)
    return np.array_equal(down.T, _whole(head.up)) and np.array_equal(up.T, _whole(head.down))
