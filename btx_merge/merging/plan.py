"""The whole merge laid out before a byte is written: its mixture, and what becomes of every input tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from btx_merge.architectures.llama import BUFFERS, EXPERT_TENSORS, HEAD
from btx_merge.checkpoints.dtypes import SAFETENSORS_NAMES
from btx_merge.checkpoints.layout import lay_out
from btx_merge.merging.mixture import Mixture
from btx_merge.merging.recipe import DIFFERENCE_METHODS, MergeRecipe
from btx_merge.sources.source import Source
from btx_merge.sources.vocabulary import Vocabulary

_MEMORY = 64_000_000
"""Bytes that a plain merge takes at its peak, whatever the models' size: a few blocks for each worker. 64 MB for 2
experts of 0.2 B parameters, 75 MB for 2 of 1.5 B (docs/performance.md: `benchmarks/merge.py --memory`)."""
_MEMORY_OF_TORCH = 500_000_000
"""For TIES and DARE: torch and peft, 350 MB once they are imported, and what torch holds beside its tensors."""
_MEMORY_OF_DIFFERENCES = 30_000_000
"""For each expert then: an estimate of its blocks of `combine.DIFFERENCE_BLOCK_BYTES` (difference, mask, signs) in
each of four workers."""
_MEMORY_OF_FIT = 850_000_000
"""For a fit: torch and transformers, 350 MB once they are imported; the rest is an estimate of the activations of
`streams._TOKENS_AT_ONCE`."""


@dataclass(frozen=True)
class Fate:
    """What became of some input tensors of a source."""

    source: str
    """The source's name."""
    fate: str
    """expert, averaged, copied (the seed alone), applied (an adapter's), passed over (a buffer, a tied head once
    more) or not used (by this recipe)."""
    tensors: int
    """How many tensors of the source that became."""
    nbytes: int
    """Their size in its files, in bytes."""


@dataclass(frozen=True)
class Plan(Mixture):
    """Everything that the writer of a merge needs; can be shown before anything is written."""

    recipe: MergeRecipe
    """What is merged and how."""

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the sources' files that the merge needs, each counted once."""
        return sum(fate.nbytes for fate in self.fates if fate.fate not in ("not used", "passed over"))

    @property
    def working_memory(self) -> int:
        """Bytes that a merge holds at its peak, about."""
        if self.recipe.is_fitted:
            # in float32: a layer, and the hidden states of all tokens, once more where the sources' own are needed
            tokens = self.recipe.domain_tokens * len(self.recipe.domain_text)
            hidden = int(self.seed.config["hidden_size"])
            states = tokens * (1 + self.recipe.fits_shared) * hidden
            layer = self.parameters // int(self.seed.config["num_hidden_layers"])
            # a head of its own: two matrices in float64 for each domain
            products = 2 * hidden**2 * len(self.recipe.domain_text) * self.recipe.has_own_head
            return _MEMORY_OF_FIT + 4 * (layer + states) + 8 * products
        if self.recipe.combine in DIFFERENCE_METHODS:
            return _MEMORY + _MEMORY_OF_TORCH + _MEMORY_OF_DIFFERENCES * len(self.experts)
        return _MEMORY

    @cached_property
    def fates(self) -> tuple[Fate, ...]:
        """Every input tensor accounted for, by source."""
        sizes: dict[tuple[str, str], list[int]] = {}
        for source in self.sources:
            for name, tensor in source.tensors.items():
                sizes.setdefault((source.name, self._fate(source, name)), []).append(tensor.nbytes)
            for delta in source.deltas.values():
                for factor in (delta.down, delta.up):
                    sizes.setdefault((source.name, "applied"), []).append(factor.nbytes)
        return tuple(Fate(source, fate, len(found), sum(found)) for (source, fate), found in sizes.items())

    def _fate(self, source: Source, name: str) -> str:
        """Return what becomes of a source's tensor, as `Fate.fate` has it."""
        if name.endswith(BUFFERS) or (name == HEAD and source.config["tie_word_embeddings"]):
            return "passed over"
        if name.endswith(tuple(pattern.split("}")[1] for pattern in EXPERT_TENSORS)):
            return "expert" if source in self.experts else "not used"
        if self.recipe.combine == "seed":
            return "copied" if source is self.seed else "not used"
        needs_seed = self.recipe.combine in DIFFERENCE_METHODS
        return "averaged" if source in self.experts or needs_seed else "not used"


def make_plan(recipe: MergeRecipe, sources: Sequence[Source], vocabulary: Vocabulary) -> Plan:
    """Lay out the result of merging checked sources (seed first).

    The plan is made twice: the tensors' shapes depend on what a sketch without them knows, such as E and I.
    """
    seed = sources[0]
    experts = tuple(sources if recipe.seed_expert else sources[1:])
    dtype = SAFETENSORS_NAMES[recipe.dtype] if recipe.dtype else seed.dtype
    sketch = Plan(
        tensors=(),
        shards=(),
        seed=seed,
        experts=experts,
        vocabulary=vocabulary,
        dtype=dtype,
        expert_mode=recipe.expert_mode,
        chunks={"whole": 1, "split": recipe.num_chunks, "blend": len(experts)}[recipe.expert_mode],
        router_type=recipe.router_type,
        num_experts_per_tok=recipe.num_experts_per_tok,
        fold_norms=recipe.fold_norms,
        has_whole_jobs=recipe.combine == "ties",
        allow_nonfinite=recipe.allow_nonfinite,
        has_own_head=recipe.has_own_head,
        recipe=recipe,
    )
    tensors, shards = lay_out(((name, dtype, shape) for name, shape in sketch.output_shapes()), recipe.shard_bytes)
    return replace(sketch, tensors=tensors, shards=shards)
