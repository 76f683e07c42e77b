"""A Mixture of Experts laid out before a byte is written: which rows of which source lie where in which file.

Merging and editing both write one. What it takes is sources and how they become experts, not a recipe.

Legend: S sources that are experts, E experts of the result, I intermediate, H hidden, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import einops
import numpy as np

from btx_merge.architectures.btx import (
    GATE_UP_EXPERTS,
    MOE_TENSORS,
    ROUTER,
    active_parameters,
    experts_per_token,
    merged_shapes,
)
from btx_merge.architectures.llama import DOWN, EMBEDDING, GATE, HEAD, UP
from btx_merge.checkpoints.layout import JOB_BYTES, Extent, Job, Layout, OutputTensor, portions
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


@dataclass(frozen=True, slots=True)
class ExpertRows(Job):
    """Rows of one source's gate, up or down, as they are (or with its norm folded in)."""

    source: int
    """The source's place among the experts."""
    name: str
    """The source's tensor."""
    fold_layer: int | None = None
    """The layer whose norm is folded in; None where nothing is."""


@dataclass(frozen=True, slots=True)
class ExpertColumns(Job):
    """Rows of every source's down, their columns dealt out to the experts; one extent per expert."""

    sources: tuple[int, ...]
    """The sources' places among the experts: one of them in `split`, all in `blend`."""
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
class Mixture(Layout):
    """The tensors of a Mixture of Experts, and the jobs that fill them from its sources."""

    seed: Source
    """The model that all experts grew from, an expert itself or not."""
    experts: tuple[Source, ...]
    """The sources that become experts and whose shared tensors are combined."""
    vocabulary: Vocabulary
    """The result's tokens, and which row of which source is whose."""
    dtype: str
    """safetensors' name of the experts' dtype."""
    expert_mode: str
    """One of `EXPERT_LAYOUTS`."""
    chunks: int
    """Pieces that each source's feed-forward block is cut into."""
    router_type: str
    """How the router chooses: top_k, switch, soft or sample_top_1."""
    num_experts_per_tok: int
    """K, the experts that `top_k` sends each token to."""
    fold_norms: bool
    """Whether gate and up absorb their source's own norm."""
    has_whole_jobs: bool
    """Whether a shared tensor is one job, however large: TIES trims over all of it."""
    allow_nonfinite: bool
    """Whether NaN and Inf are written like any other value."""
    has_own_head: bool
    """Whether it has a head of its own even where all sources are tied."""

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
        sources = (self.seed, *self.experts)
        return not self.has_own_head and all(source.config["tie_word_embeddings"] for source in sources)

    @property
    def num_experts(self) -> int:
        """E, the experts of each layer."""
        return len(self.expert_names)

    @property
    def expert_names(self) -> list[str]:
        """In the order of the router's rows. A blended expert is a part of every source."""
        names = [source.name for source in self.experts]
        if self.expert_mode == "blend":
            return [f"blend.{chunk}" for chunk in range(self.chunks)]
        if self.chunks == 1:
            return names
        return [f"{name}.{chunk}" for name in names for chunk in range(self.chunks)]

    @property
    def expert_width(self) -> int:
        """The intermediate size of one expert."""
        width: int = self.seed.config["intermediate_size"]
        return width // self.chunks * (len(self.experts) if self.expert_mode == "blend" else 1)

    @property
    def experts_per_token(self) -> int:
        """Experts that run for one token in inference."""
        return experts_per_token(self.router_type, self.num_experts_per_tok, self.num_experts)

    @property
    def active_parameters(self) -> int:
        """Weights that one token passes through, with K of E experts per layer."""
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        return active_parameters(shapes, self.num_experts, self.experts_per_token)

    def rows_of(self, name: str) -> int:
        """Count the rows of a shared tensor of the result."""
        if name in (EMBEDDING, HEAD):
            return self.vocabulary.size
        return self.seed.tensors[name].shape[0]

    def source_layout(self, name: str) -> Mapping[str, tuple[Segment, ...]]:
        """Return, per source, which of its rows of a shared tensor belong to which of the result's.

        All rows in their order, but for the embedding and the head, where each source has the rows of its own tokens.
        """
        if name in (EMBEDDING, HEAD):
            return self.vocabulary.segments
        return {source.name: (Segment(0, 0, self.rows_of(name)),) for source in self.sources}

    def _jobs_of(self, tensor: OutputTensor) -> Iterator[Job]:
        """Cut the writing of one tensor into jobs of about `JOB_BYTES`."""
        for pattern in MOE_TENSORS:
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
        nbytes = tensor.nbytes if self.has_whole_jobs else JOB_BYTES
        for start, stop in portions(0, rows, tensor.row_bytes, nbytes):
            extent = Extent(tensor.start + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)
            yield SharedRows(tensor, (extent,), start, stop)

    @cached_property
    def _gate_up_runs(self) -> tuple[Segment, ...]:
        """Runs of rows from the sources' gates, then ups, to the experts' rows. The same in every layer.

        All these tensors are numbered as if they lay one behind the other, with a gap of one row after each, so that
        no run leads from one into the next: row r of tensor number n is n (I + 1) + r, with the sources' I.
        """
        sources, width = len(self.experts), self.seed.config["intermediate_size"]
        index = np.arange(2 * sources)[:, None] * (width + 1) + np.arange(width)
        index = index.reshape(2, sources, width)
        pattern = EXPERT_LAYOUTS[self.expert_mode].gate_up
        return runs(einops.rearrange(index, pattern, c=self.chunks).reshape(-1))

    def _gate_up_jobs(self, tensor: OutputTensor, layer: int) -> Iterator[Job]:
        """Cut the writing of gate and up of all experts, [E, 2I, H], into jobs that each copy rows of one source."""
        width = self.seed.config["intermediate_size"]
        row_bytes = tensor.row_bytes // tensor.shape[1]  # of [H]; the tensor's own rows are whole experts, [2I, H]
        for run in self._gate_up_runs:
            number, row = divmod(run.row, width + 1)
            two, source = divmod(number, len(self.experts))  # the gates of all sources come first, then the ups
            name = (GATE, UP)[two].format(layer=layer)
            for start, stop in portions(row, row + run.count, row_bytes, JOB_BYTES):
                offset = tensor.start + (run.out + start - row) * row_bytes
                extents = (Extent(offset, (stop - start) * row_bytes),)
                fold = layer if self.fold_norms else None
                yield ExpertRows(tensor, extents, start, stop, source, name, fold)

    def _down_jobs(self, tensor: OutputTensor, layer: int) -> Iterator[Job]:
        """Cut the writing of down of all experts, [E, H, I], into jobs.

        A chunk is a range of columns there, so a job reads whole rows of one source, or of all that are blended, and
        writes a part of each row to each expert that they become. A source that stays whole is copied by rows.
        """
        name, hidden = DOWN.format(layer=layer), tensor.shape[1]
        row_bytes = tensor.row_bytes // hidden  # of one expert
        groups: Sequence[tuple[int, ...]] = [(index,) for index in range(len(self.experts))]
        if self.expert_mode == "blend":
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

    def output_shapes(self) -> Iterable[tuple[str, tuple[int, ...]]]:
        """Return name and shape of every tensor of the result, in the order in which a token meets them."""
        config = {**self.seed.config, "vocab_size": self.vocabulary.size, "tie_word_embeddings": self.tied}
        config |= {"intermediate_size": self.expert_width, "num_local_experts": self.num_experts}
        return merged_shapes(config).items()
