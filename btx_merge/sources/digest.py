"""A short text that identifies a source: a merge records it, and its recipe is checked against it later."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

from btx_merge.architectures.llama import is_computed
from btx_merge.checkpoints.stored import StoredTensor, flat_bytes
from btx_merge.checkpoints.tensor_files import read_tensor_file
from btx_merge.errors import InputError, Problem
from btx_merge.sources.source import SEED, Source

_DIGEST_BYTES = 16  # it finds mistakes, no forgery: 32 characters in a recipe are enough
_PLACES, _BYTES = 16, 4096
"""Places of each tensor of a merged model, evenly spread, and bytes from each, that its digest is made of: training
changes them all."""


def source_digest(source: Source) -> str:
    """Return a digest of every tensor's name, dtype, shape and first, middle and last row: cheap for any size.

    How a model is cut into files changes nothing of it. Of an adapter, its own tensors and its base's count.

    Raises:
        InputError: a file ends too soon.
    """
    digest = _digest_of(_tensors(source))
    for name, delta in sorted(source.deltas.items()):
        digest.update(f"{name} {delta.scaling!r}\n".encode())
    return digest.hexdigest()


def model_digest(tensors: Mapping[str, StoredTensor]) -> str:
    """Return a digest of a merged model's tensors, by some bytes of each. Rows of experts would be whole experts.

    Raises:
        InputError: a file that ends too soon.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # experts [E, ...]: from each of them
        places = max(_PLACES, tensor.shape[0] if len(tensor.shape) == 3 else 0)
        whole = flat_bytes(tensor)
        for first in sorted({whole.nbytes * place // places for place in range(places)}):
            digest.update(whole.read_rows(first, min(first + _BYTES, whole.nbytes)).data)
    return digest.hexdigest()


def _digest_of(tensors: Iterable[tuple[str, StoredTensor]]) -> hashlib.blake2b:
    """Return a digest of tensors by name, in any order."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode("utf-8", "surrogatepass"))
        rows = tensor.shape[0] if tensor.shape else 1
        for row in sorted({0, rows // 2, rows - 1}) if tensor.nbytes else ():
            digest.update(tensor.read_rows(row, row + 1).tobytes())
    return digest


def _tensors(source: Source) -> Iterator[tuple[str, StoredTensor]]:
    """Return the tensors of a source as they lie in its files, not as peft computed them."""
    tensors: Mapping[str, StoredTensor] = source.tensors
    if source.origin:
        tensors = {}
        for file in source.origin:
            if file.suffix in (".safetensors", ".bin"):
                tensors |= read_tensor_file(file)
    for name, tensor in tensors.items():
        if not is_computed(name):
            yield name, tensor
    for name, delta in source.deltas.items():
        yield f"{name} down", delta.down
        yield f"{name} up", delta.up


def changed_problems(sources: Iterable[Source], digests: Mapping[str, str]) -> Iterator[Problem]:
    """Return which sources are other models than a recipe's record says.

    Args:
        digests: of the sources that are to be compared, by name.
    """
    for source in sources:
        try:
            if source.name not in digests or source_digest(source) == digests[source.name]:
                continue
        except InputError as error:
            yield from error.problems
            continue
        flag = "--seed MODEL" if source.name == SEED else f"--expert {source.name}=MODEL"
        found = "not the model that this recipe was written for: its tensors are others"
        remedy = f"Give the right one by {flag}, or take `resolved` out of the recipe, if this one is meant."
        yield Problem(source.name, str(source.located.folder), found, "the model that was merged", remedy)
