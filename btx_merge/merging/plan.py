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


EXPERT_LAYOUTS = {
    "whole": ExpertLayout("two s (c i) -> (s c) (two i)", "s h (c i) -> (s c) h i"),
    "split": ExpertLayout("two s (c i) -> (s c) (two i)", "s h (c i) -> (s c) h i"),
    "blend": ExpertLayout("two s (c i) -> c (two s i)", "s h (c i) -> c h (s i)"),
}


@dataclass(frozen=True, slots=True)
class ExpertRows(Job):
    """Rows of one source's gate, up or down, as they are (or with its norm folded in)."""

    source: int
    name: str
    fold_layer: int | None = None


@dataclass(frozen=True, slots=True)
class ExpertColumns(Job):
    """Rows of every source's down, their columns dealt out to the experts; one extent per expert."""

    sources: tuple[int, ...]
    name: str


@dataclass(frozen=True, slots=True)
class SharedRows(Job):
    """Rows of a tensor that is combined over the sources."""


@dataclass(frozen=True, slots=True)
class RouterRows(Job):
    """A layer's whole router."""

    layer: int


@dataclass(frozen=True)
class Fate:
    """What became of some input tensors of a source."""

    source: str
    fate: str
    """expert, averaged, copied (the seed alone), applied (an adapter's), passed over (a buffer, a tied head once
    more) or not used (by this recipe)."""
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Plan(Layout):
    """Everything that the writer needs; can be shown before anything is written."""

    recipe: MergeRecipe
    seed: Source
    experts: tuple[Source, ...]
    """The sources that become experts and whose shared tensors are combined."""
    vocabulary: Vocabulary
    dtype: str

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
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
        return sum(fate.nbytes for fate in self.fates if fate.fate not in ("not used", "passed over"))

    @property
    def working_memory(self) -> int:
        """Bytes that a merge holds beside the interpreter itself, about."""
        if self.recipe.is_fitted:  # a layer and, in float32, the tokens' hidden states, twice for what sources do
            tokens = self.recipe.domain_tokens * len(self.recipe.domain_text)
            states = tokens * (1 + self.recipe.fits_shared) * int(self.seed.config["hidden_size"])
            layer = self.parameters // int(self.seed.config["num_hidden_layers"])
            return 850_000_000 + 4 * (layer + states)
        needs_torch = self.recipe.combine in DIFFERENCE_METHODS
        return 64_000_000 + needs_torch * (500_000_000 + 30_000_000 * len(self.experts))

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
        if name.endswith(BUFFERS) or (name == HEAD and source.config["tie_word_embeddings"]):
            return "passed over"
        if name.endswith(tuple(pattern.split("}")[1] for pattern in EXPERT_TENSORS)):
            return "expert" if source in self.experts else "not used"
        if self.recipe.combine == "seed":
            return "copied" if source is self.seed else "not used"
        needs_seed = self.recipe.combine in DIFFERENCE_METHODS
        return "averaged" if source in self.experts or needs_seed else "not used"

    def rows_of(self, name: str) -> int:
        """Rows of a shared tensor of the result."""
        if name in (EMBEDDING, HEAD):
            return self.vocabulary.size
        return self.seed.tensors[name].shape[0]

    def source_layout(self, name: str) -> Mapping[str, tuple[Segment, ...]]:
        """Per source, which of its rows of a shared tensor belong to which of the result's."""
        if name in (EMBEDDING, HEAD):
            return self.vocabulary.segments
        return {source.name: (Segment(0, 0, self.rows_of(name)),) for source in self.sources}

    def _jobs_of(self, tensor: OutputTensor) -> Iterator[Job]:
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
        """Runs of rows from the sources' gates, then ups, to the experts' rows. The same in every layer."""
        sources, width = len(self.experts), self.seed.config["intermediate_size"]
        # A gap after each tensor, so that no run leads from one into the next.
        index = np.arange(2 * sources)[:, None] * (width + 1) + np.arange(width)
        index = index.reshape(2, sources, width)
        pattern = EXPERT_LAYOUTS[self.recipe.expert_mode].gate_up
        return runs(einops.rearrange(index, pattern, c=self.chunks).reshape(-1))

    def _gate_up_jobs(self, tensor: OutputTensor, layer: int) -> Iterator[Job]:
        width = self.seed.config["intermediate_size"]
        row_bytes = tensor.row_bytes // tensor.shape[1]
        for run in self._gate_up_runs:
            which, row = divmod(run.row, width + 1)
            two, source = divmod(which, len(self.experts))
            name = (GATE, UP)[two].format(layer=layer)
            for start, stop in portions(row, row + run.count, row_bytes, JOB_BYTES):
                offset = tensor.start + (run.out + start - row) * row_bytes
                extents = (Extent(offset, (stop - start) * row_bytes),)
                fold = layer if self.recipe.fold_norms else None
                yield ExpertRows(tensor, extents, start, stop, source, name, fold)

    def _down_jobs(self, tensor: OutputTensor, layer: int) -> Iterator[Job]:
        name, hidden = DOWN.format(layer=layer), tensor.shape[1]
        row_bytes = tensor.row_bytes // hidden  # of one expert
        sources: Sequence[tuple[int, ...]] = [(index,) for index in range(len(self.experts))]
        if self.recipe.expert_mode == "blend":
            sources = [tuple(range(len(self.experts)))]
        per_group = self.num_experts // len(sources)
        for group, members in enumerate(sources):
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
    """Lays out the result of merging checked sources (seed first)."""
    seed = sources[0]
    experts = tuple(sources if recipe.seed_expert else sources[1:])
    dtype = SAFETENSORS_NAMES[recipe.dtype] if recipe.dtype else seed.dtype
    sketch = Plan((), (), recipe, seed, experts, vocabulary, dtype)
    shapes = ((name, dtype, shape) for name, shape in _output_shapes(sketch))
    tensors, shards = lay_out(shapes, recipe.shard_bytes)
    return replace(sketch, tensors=tensors, shards=shards)


def _output_shapes(plan: Plan) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the result, in the order in which a token meets them."""
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
