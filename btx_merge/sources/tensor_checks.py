"""Checks that a source, by its config.json, is a Llama that can be an expert, and has that Llama's tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from btx_merge.architectures.llama import EMBEDDING, HEAD, expected_tensors, is_computed
from btx_merge.architectures.loading_rules import config_refusals
from btx_merge.checkpoints.dtypes import STORED
from btx_merge.checkpoints.stored import same_bytes
from btx_merge.errors import Problem, capped
from btx_merge.sources.source import Source

_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.")
"""What torch.compile, DataParallel and DDP, peft and FSDP put before the names of a state dict that they wrap."""
_MANY = 4
"""Tensors of one kind that are named one by one, as `errors.capped` does; more become one line."""


def expert_problems(source: Source) -> Iterator[Problem]:
    """Find what transformers would refuse in a source's config.json, and what keeps it from becoming an expert."""
    yield from config_refusals(source.name, source.config)
    if source.config["mlp_bias"]:
        remedy = "Feed-forward blocks with biases cannot become experts."
        yield Problem(source.name, "config.json: mlp_bias", "True", "False", remedy)


def tensor_problems(source: Source) -> Iterator[Problem]:
    """Find tensors that are missing, unexpected, of another shape than config.json says, or of a dtype not merged."""
    expected = expected_tensors(source.config)
    found = {name for name in source.tensors if not is_computed(name)}
    if source.config["tie_word_embeddings"] and HEAD in found:
        found.discard(HEAD)
        yield from _head_of_tied_problems(source)
    missing = [name for name in expected if name not in found]
    remedy = "Save the whole LlamaForCausalLM with save_pretrained."
    # most of what is missing is there without its first word
    if missing and len({"model." + name for name in found} & set(missing)) > len(missing) // 2:
        remedy = "This is a bare LlamaModel; save the LlamaForCausalLM."
    if prefix := _common_prefix(found, expected):
        remedy = (
            f"Every name begins with `{prefix}`, which a wrapper left there: take it off all names and save again."
        )
    yield from _listed(source, "missing", missing, "there, by config.json", remedy)
    if not prefix:
        remedy = "If config.json is right, leave these tensors out and save the model again."
    yield from _listed(source, "unexpected", sorted(found - set(expected)), "a Llama's tensors only", remedy)
    yield from _shape_problems(source, expected, sorted(found & set(expected)))


def _common_prefix(found: Collection[str], expected: Collection[str]) -> str:
    """Return what a wrapper such as torch.compile or DataParallel has put before every name; "" for nothing.

    >>> _common_prefix({"module.model.norm.weight", "module.lm_head.weight"}, {"model.norm.weight", "lm_head.weight"})
    'module.'
    >>> _common_prefix({"module.model.norm.weight", "lm_head.weight"}, {"model.norm.weight", "lm_head.weight"})
    ''
    """
    for prefix in _WRAPPERS:
        bare = {name.removeprefix(prefix) for name in found if name.startswith(prefix)}
        if len(bare) == len(found) and bare & set(expected):
            return prefix
    return ""


def _shape_problems(
    source: Source, expected: Mapping[str, tuple[int, ...]], names: Sequence[str]
) -> Iterator[Problem]:
    """Compare the shapes and dtypes of the tensors `names`, which a source has, with what is expected."""
    shapes, dtypes = [], []
    for name in names:
        tensor = source.tensors[name]
        if tensor.shape != expected[name]:
            wanted = f"{list(expected[name])} by config.json"
            remedy = "Weights and config.json must be of one model: save both again with save_pretrained."
            where = f"{tensor.file.name}: {name}"
            shapes.append(Problem(source.name, where, f"shape {list(tensor.shape)}", wanted, remedy))
        if tensor.dtype not in STORED:
            remedy = "A quantised checkpoint: load it, call model.dequantize(), save it, and give that folder."
            if tensor.dtype == "F64":
                remedy = "Load it in transformers, call model.float(), save_pretrained, and give that folder."
            found_dtype = f"dtype {tensor.dtype}"
            wanted = f"one of {', '.join(STORED)}"
            dtypes.append(Problem(source.name, f"{tensor.file.name}: {name}", found_dtype, wanted, remedy))
    yield from capped(shapes)
    yield from capped(dtypes)


def _listed(source: Source, kind: str, names: Sequence[str], expected: str, remedy: str) -> Iterator[Problem]:
    """Report tensors that are all wrong in one way: the first `_MANY` by name, the others by their number."""
    for name in names[:_MANY]:
        yield Problem(source.name, f"tensor {name}", kind, expected, remedy)
    if len(names) > _MANY:
        yield Problem(source.name, f"{len(names) - _MANY} more tensors", kind, expected, remedy)


def _head_of_tied_problems(source: Source) -> Iterator[Problem]:
    """Check the head that a tied checkpoint holds all the same: it must be the embedding once more.

    transformers ignores it at load, so other numbers there would silently be lost. Reads both tensors.
    """
    head, embedding = source.tensors[HEAD], source.tensors.get(EMBEDDING)
    if embedding is None or not same_bytes(head, embedding):
        found = f"{HEAD} differs from the embedding although tie_word_embeddings is true"
        remedy = "Say false in its config.json if the head is meant, or delete the tensor if it is not."
        yield Problem(source.name, head.file.name, found, "the same numbers, or no such tensor", remedy)
