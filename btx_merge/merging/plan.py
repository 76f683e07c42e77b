"""The whole merge laid out before a byte is written: every tensor of the result, where it lies in which file,
and the jobs that fill it.

Legend: S sources that are experts, E experts of the result, I intermediate, H hidden, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import einops
import numpy as np

from btx_merge.architectures.btx import _MOE_TENSORS, GATE_UP_EXPERTS, ROUTER, active_parameters, experts_per_token
from btx_merge.architectures.llama import (
    ATTENTION_BIASES,
    BUFFERS,
    DOWN,
    EMBEDDING,
    EXPERT_TENSORS,
    GATE,
    HEAD,
    SHARED_TENSORS,
    UP,
    dimensions,
    expected_tensors,
)
from btx_merge.checkpoints.dtypes import SAFETENSORS_NAMES
from btx_merge.checkpoints.layout import JOB_BYTES, Extent, Job, Layout, OutputTensor, lay_out, portions
from btx_merge.merging.recipe import DIFFERENCE_METHODS, MergeRecipe
from btx_merge.sources.segments import Segment, runs
from btx_merge.sources.source import Source
from btx_merge.sources.vocabulary import Vocabulary


@dataclass(frozen=True)
class ExpertLayout:
    """How the sources' feed-forward blocks become experts. s: source, c: chunk, i: width, h: hidden."""

    gate_up: str
    """Rows of gate (two = 0) and up (two = 1) of all sources -> rows of every expert."""
    down: str
    """Columns of all sources' down -> columns of every expert."""


EXPERT_LAYOUTS = {
    "whole": ExpertLayout("two s (c i) -> (s c) (two i)", "s h (c i) -> (s c) h i"),
    "split": ExpertLayout("two s (c i) -> (s c) (two i)", "s h (c i) -> (s c) h i"),
    "blend": ExpertLayout("two s (c i) -> c (two s i)", "s h (c i) -> c h (s i)"),
}
"""By `expert_mode`. Two sources of width 4 in two chunks, whose neurons are a0 to a3 and b0 to b3:

split   a.0 has a0 a1    a.1 has a2 a3    b.0 has b0 b1    b.1 has b2 b3
blend   blend.0 has a0 a1 b0 b1           blend.1 has a2 a3 b2 b3
"""

_MEMORY = 64_000_000
"""Bytes that a plain merge takes at its peak, whatever the models' size: a few blocks for each worker. 64 MB for 2
experts of 0.2 B parameters, 75 MB for 2 of 1.5 B (docs/performance.md: `benchmarks/merge.py --memory`)."""
_MEMORY_OF_TORCH = 500_000_000
"""For TIES and DARE: torch and peft, 350 MB once they are imported, and what torch holds beside its tensors."""
_MEMORY_OF_DIFFERENCES = 30_000_000
"""An expert's part of that: some fifteen arrays of `combine.DIFFERENCE_BLOCK_BYTES`, its difference, mask and signs in
each of four workers."""
_MEMORY_OF_FIT = 850_000_000
"""For a fit: torch and transformers, 350 MB once they are imported, and the activations of a batch of windows
(`streams._TOKENS_AT_ONCE`)."""


@dataclass(frozen=True, slots=True)
class ExpertRows(Job):
    """Rows of one source's gate, up or down, as they are (or with its norm folded in)."""

    source: int
    """The source's place among the plan's experts."""
    name: str
    """The source's tensor."""
    fold_layer: int | None = None
    """The layer whose norm is folded in; None where nothing is."""


@dataclass(frozen=True, slots=True)
class ExpertColumns(Job):
    """Rows of every source's down, their columns dealt out to the experts; one extent per expert."""

    sources: tuple[int, ...]
    """The sources' places among the plan's experts: one of them in `split`, all in `blend`."""
    name: str
    """The tensor, by one name in all of them."""


@dataclass(frozen=True, slots=True)
class SharedRows(Job):
    """Rows of a tensor that is combined over the sources."""


@dataclass(frozen=True, slots=True)
class RouterRows(Job):
    """A layer's whole router."""

    layer: int
    """The layer's number, from 0."""


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
class Plan(Layout):
    """Everything that the writer needs; can be shown before anything is written."""

    recipe: MergeRecipe
    """What is merged and how."""
    seed: Source
    """The model that all experts grew from, an expert itself or not."""
    experts: tuple[Source, ...]
    """The sources that become experts and whose shared tensors are combined."""
    vocabulary: Vocabulary
    """The result's tokens, and which row of which source is whose."""
    dtype: str
    """safetensors' name of the dtype that the result is stored in."""

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        """Everything that fills the tensors, in the order of the files."""
        return tuple(job for tensor in self.tensors for job in self._jobs_of(tensor))

    @property
    def sources(self) -> tuple[Source, ...]:
        """Seed first, whether or not it is an expert."""
        return self.experts if self.seed in self.experts else (self.seed, *self.experts)

    @property
    def tied(self) -> bool:
        """Whether the result's head is its embedding."""
        return all(source.config["tie_word_embeddings"] for source in (self.seed, *self.experts))

    @property
    def num_experts(self) -> int:
        """E, the experts of each layer."""
        return len(self.expert_names)

    @property
    def chunks(self) -> int:
        """Pieces that each source's feed-forward block is cut into."""
        return {"whole": 1, "split": self.recipe.num_chunks, "blend": len(self.experts)}[self.recipe.expert_mode]

    @property
    def expert_names(self) -> list[str]:
        """In the order of the router's rows. A blended expert is a part of every source."""
        names = [source.name for source in self.experts]
        if self.recipe.expert_mode == "blend":
            return [f"blend.{chunk}" for chunk in range(self.chunks)]
        if self.chunks == 1:
            return names
        return [f"{name}.{chunk}" for name in names for chunk in range(self.chunks)]

    @property
    def expert_width(self) -> int:
        """The intermediate size of one expert."""
        width: int = self.seed.config["intermediate_size"]
        return width // self.chunks * (len(self.experts) if self.recipe.expert_mode == "blend" else 1)

    @property
    def experts_per_token(self) -> int:
        """Experts that run for one token in inference."""
        return experts_per_token(self.recipe.router_type, self.recipe.num_experts_per_tok, self.num_experts)

    @property
    def active_parameters(self) -> int:
        """Weights that one token passes through, with K of E experts per layer."""
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        return active_parameters(shapes, self.num_experts, self.experts_per_token)

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
            states = tokens * (1 + self.recipe.fits_shared) * int(self.seed.config["hidden_size"])
            layer = self.parameters // int(self.seed.config["num_hidden_layers"])
            return _MEMORY_OF_FIT + 4 * (layer + states)
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

    def rows_of(self, name: str) -> int:
        """Count the rows of a shared tensor of the result."""
        if name in (EMBEDDING, HEAD):
            return self.vocabulary.size
        return self.seed.tensors[name].shape[0]

    def source_layout(self, name: str) -> Mapping[str, tuple[Segment, ...]]:
        """Return, by source, which of its rows of a shared tensor belong to which of the result's.

        All rows in their order, but for the embedding and the head, where each source has the rows of its own tokens.
        """
        if name in (EMBEDDING, HEAD):
            return self.vocabulary.segments
        return {source.name: (Segment(0, 0, self.rows_of(name)),) for source in self.sources}

    def _jobs_of(self, tensor: OutputTensor) -> Iterator[Job]:
        """Cut the writing of one tensor into jobs of about `JOB_BYTES`."""
        for pattern in _MOE_TENSORS:
            front, _, back = pattern.partition("{layer}")
            if tensor.name.startswith(front) and tensor.name.endswith(back):
                layer = int(tensor.name.removeprefix(front).removesuffix(back))
                if pattern == ROUTER:
                    yield RouterRows(tensor, (Extent(tensor.start, tensor.nbytes),), 0, tensor.shape[0], layer)
                elif pattern == GATE_UP_EXPERTS:
                    yield from self._gate_up_jobs(tensor, layer)
                else:
                    yield from self._down_jobs(tensor, layer)
                return
        rows = tensor.shape[0]
        # TIES trims over a whole tensor, so it is one job there
        nbytes = tensor.nbytes if self.recipe.combine == "ties" else JOB_BYTES
        for start, stop in portions(0, rows, tensor.row_bytes, nbytes):
            extent = Extent(tensor.start + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)
            yield SharedRows(tensor, (extent,), start, stop)

    @cached_property
    def _gate_up_runs(self) -> tuple[Segment, ...]:
        """Runs of rows from the sources' gates, then ups, to the experts' rows. The same in every layer.

        All these tensors are numbered as if they lay one behind the other, with a gap of one row after each, so that
        no run leads from one into the next: row r of tensor number n is n (I + 1) + r.
        """
        sources, width = len(self.experts), self.seed.config["intermediate_size"]
        index = np.arange(2 * sources)[:, None] * (width + 1) + np.arange(width)
        index = index.reshape(2, sources, width)
        pattern = EXPERT_LAYOUTS[self.recipe.expert_mode].gate_up
        return runs(einops.rearrange(index, pattern, c=self.chunks).reshape(-1))

    def _gate_up_jobs(self, tensor: OutputTensor, layer: int) -> Iterator[Job]:
        """Cut the writing of gate and up of all experts, [E, 2I, H], into jobs that each copy rows of one source."""
        width = self.seed.config["intermediate_size"]
        row_bytes = tensor.row_bytes // tensor.shape[1]  # a "row" of the tensor is a whole expert, [2I, H]
        for run in self._gate_up_runs:
            number, row = divmod(run.row, width + 1)
            two, source = divmod(number, len(self.experts))  # the gates of all sources come first, then the ups
            name = (GATE, UP)[two].format(layer=layer)
            for start, stop in portions(row, row + run.count, row_bytes, JOB_BYTES):
                offset = tensor.start + (run.out + start - row) * row_bytes
                extents = (Extent(offset, (stop - start) * row_bytes),)
                fold = layer if self.recipe.fold_norms else None
                yield ExpertRows(tensor, extents, start, stop, source, name, fold)

    def _down_jobs(self, tensor: OutputTensor, layer: int) -> Iterator[Job]:
        """Cut the writing of down of all experts, [E, H, I], into jobs.

        A chunk is a range of columns there, so a job reads whole rows of one source, or of all that are blended, and
        writes a part of each row to each expert that these become. One that stays whole is copied by rows.
        """
        name, hidden = DOWN.format(layer=layer), tensor.shape[1]
        row_bytes = tensor.row_bytes // hidden  # of one expert
        groups: Sequence[tuple[int, ...]] = [(index,) for index in range(len(self.experts))]
        if self.recipe.expert_mode == "blend":
            groups = [tuple(range(len(self.experts)))]
        per_group = self.num_experts // len(groups)
        for group, members in enumerate(groups):
            experts = range(group * per_group, (group + 1) * per_group)
            for start, stop in portions(0, hidden, row_bytes * per_group, JOB_BYTES):
                size = (stop - start) * row_bytes
                first = tensor.start + start * row_bytes
                extents = tuple(Extent(first + expert * tensor.row_bytes, size) for expert in experts)
                if self.chunks == 1:
                    yield ExpertRows(tensor, extents, start, stop, members[0], name)
                else:
                    yield ExpertColumns(tensor, extents, start, stop, members, name)


def make_plan(recipe: MergeRecipe, sources: Sequence[Source], vocabulary: Vocabulary) -> Plan:
    """Lay out the result of merging checked sources (seed first).

    The plan is made twice: sizes and names of experts, which the tensors' shapes depend on, are the sketch's.
    """
    seed = sources[0]
    experts = tuple(sources if recipe.seed_expert else sources[1:])
    dtype = SAFETENSORS_NAMES[recipe.dtype] if recipe.dtype else seed.dtype
    sketch = Plan((), (), recipe, seed, experts, vocabulary, dtype)
    shapes = ((name, dtype, shape) for name, shape in _output_shapes(sketch))
    tensors, shards = lay_out(shapes, recipe.shard_bytes)
    return replace(sketch, tensors=tensors, shards=shards)


def _output_shapes(plan: Plan) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of the result, in the order in which a token meets them."""
    config = {**plan.seed.config, "vocab_size": plan.vocabulary.size, "tie_word_embeddings": plan.tied}
    shared = {name: shape for name, shape in expected_tensors(config).items() if ".mlp." not in name}
    sizes = {**dimensions(config), "E": plan.num_experts, "I": plan.expert_width, "2I": 2 * plan.expert_width}
    moe = {name: tuple(sizes[letter] for letter in letters.split()) for name, letters in _MOE_TENSORS.items()}
    of_layer = [name for name in (*SHARED_TENSORS, *ATTENTION_BIASES) if "{layer}" in name]
    yield EMBEDDING, shared[EMBEDDING]
    for layer in range(config["num_hidden_layers"]):
        names = [name.format(layer=layer) for name in of_layer]
        yield from ((name, shared[name]) for name in names if name in shared)
        yield from ((name.format(layer=layer), shape) for name, shape in moe.items())
    yield from ((name, shared[name]) for name in ("model.norm.weight", HEAD) if name in shared)
