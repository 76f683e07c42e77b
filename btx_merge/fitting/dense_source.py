"""The dense sources of a merge, run one layer at a time: what the merged model is fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from btx_merge.fitting.passing import ATTENTION
from btx_merge.fitting.reading import Tensors, fill_layer, gather_stored, on_device, read_stored
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
        self.config._attn_implementation = ATTENTION

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows [start, stop) of a tensor, all by default, on the host.

        In the dtype that the file has, or in float32 where an adapter's delta is added.
        """
        stored = self.source.stored_name(name)
        tensor = self.source.tensors[stored]
        if stored not in self.source.deltas:
            return read_stored(tensor, self.device, start, stop)
        return torch.from_numpy(self.source.rows(name, start, tensor.shape[0] if stop is None else stop))

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole tensor on the device in float32, an adapter's delta included."""
        return on_device(self.read(name), self.device)

    def read_part(self, index: int, part: str) -> Tensors:
        """Read a layer's weights of `part`, `attention` or `feed_forward`, and of the norm before it, by name."""
        wanted = ("self_attn.", "input_layernorm.") if part == "attention" else ("mlp.", "post_attention_layernorm.")
        names = [name for name, _ in self._empty_layer(index).named_parameters() if name.startswith(wanted)]
        return {name: self.read(f"model.layers.{index}.{name}") for name in names}

    def layer(self, index: int, tensors: Tensors) -> LlamaDecoderLayer:
        """Build a layer of which a part has weights, those that `read_part` gave."""
        layer: LlamaDecoderLayer = fill_layer(self._empty_layer(index), tensors, self.device, is_part=True)
        return layer

    def _empty_layer(self, index: int) -> LlamaDecoderLayer:
        with torch.device("meta"):
            return LlamaDecoderLayer(self.config, index)

    def rows(self, name: str, start: int, others: torch.Tensor) -> torch.Tensor:
        """Return rows of its embedding or head in the result's vocabulary; of tokens that it does not know, `others`.

        Args:
            start: first row.
            others: the rows that the result has, [rows, H].
        """
        out = others.clone()
        for segment in within(self.segments, start, start + len(others)):
            rows = on_device(self.read(name, segment.row, segment.row + segment.count), self.device)
            out[segment.out - start : segment.out - start + segment.count] = rows
        return out

    def gather(self, name: str, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return single rows of its embedding or head, as `rows` does.

        Args:
            rows: of the result's vocabulary, [R].
            others: the rows that the result has, [R, H].
        """
        out = others.clone()
        for segment in self.segments:
            here = (rows >= segment.out) & (rows < segment.out + segment.count)
            if here.any():
                own = self._gather(name, rows[here] - segment.out + segment.row)
                out[here.to(self.device)] = on_device(own, self.device)
        return out

    def _gather(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return single rows, [R], of its own vocabulary, as `read` does."""
        stored = self.source.stored_name(name)
        if stored not in self.source.deltas:
            return gather_stored(self.source.tensors[stored], rows)
        return torch.cat([self.read(name, row, row + 1) for row in rows.tolist()])
