"""The dense sources of a merge, run one layer at a time: what the merged model is fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from btx_merge.sources.segments import Segment, within
from btx_merge.sources.source import Source

_ROWS = 16_384
"""Rows of an embedding or a head that are held at once: 268 MB in float32 where H is 4,096."""


def row_blocks(rows: int) -> Iterator[tuple[int, int]]:
    """Cut an embedding's rows into blocks."""
    return ((start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))


class DenseSource:
    """One source of a merge.

    Args:
        segments: which of its embedding's rows belong to which of the result's.
    """

    def __init__(self, source: Source, segments: Sequence[Segment], device: torch.device):
        self.source, self.segments, self.device = source, segments, device
        config = dict(source.raw_config)
        config.pop("dtype", None)
        config.pop("torch_dtype", None)
        self.config = LlamaConfig.from_dict(config)
        self.config._attn_implementation = "sdpa"

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole tensor in float32, an adapter's delta included."""
        rows = self.source.tensors[self.source.stored_name(name)].shape[0]
        return torch.from_numpy(self.source.rows(name, 0, rows)).to(self.device)

    def layer(self, index: int, part: str) -> LlamaDecoderLayer:
        """Build a layer with the weights of `part`, `attention` or `feed_forward`, and of the norm before it."""
        with torch.device("meta"):
            layer = LlamaDecoderLayer(self.config, index)
        wanted = ("self_attn.", "input_layernorm.") if part == "attention" else ("mlp.", "post_attention_layernorm.")
        names = [name for name, _ in layer.named_parameters() if name.startswith(wanted)]
        tensors = {name: self.tensor(f"model.layers.{index}.{name}") for name in names}
        layer.load_state_dict(tensors, strict=False, assign=True)
        return layer.eval()

    def rows(self, name: str, start: int, others: torch.Tensor) -> torch.Tensor:
        """Return rows of its embedding or head in the result's vocabulary; of tokens that it does not know, `others`.

        Args:
            start: first row.
            others: the rows that the result has, [rows, H].
        """
        out = others.clone()
        for segment in within(self.segments, start, start + len(others)):
            rows = self.source.rows(name, segment.row, segment.row + segment.count)
            out[segment.out - start : segment.out - start + segment.count] = torch.from_numpy(rows).to(self.device)
        return out
