"""Weights and states on their way to the device, and a layer's attention, against slow references."""

import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from btx_merge import ExpertSpec, NonFiniteError
from btx_merge.checkpoints.stored import join
from btx_merge.checkpoints.tensor_files import read_tensor_file
from btx_merge.fitting import reading, states
from btx_merge.fitting.checkpoint import Checkpoint
from btx_merge.fitting.dense_source import DenseSource
from btx_merge.fitting.passing import ATTENTION, Passage
from btx_merge.fitting.reading import ReadAhead, gather_stored, on_device, read_stored
from btx_merge.fitting.states import States, place_of_states
from btx_merge.fitting.streams import TokenStream
from btx_merge.sources.opening import open_source
from btx_merge.sources.segments import Segment
from tests.support.common import HIDDEN, load_float32, save_seed

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 100, 10**6])
def test_rows_are_read_in_their_own_dtype_into_memory_of_their_own(tmp_path, monkeypatch, dtype, block):
    monkeypatch.setattr(reading, "_BLOCK_BYTES", block)
    torch.manual_seed(0)
    tensors = {"matrix": torch.randn(7, 6), "cube": torch.randn(3, 4, 5), "vector": torch.randn(9)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_tensor_file(tmp_path / "model.safetensors")
    found = {name: read_stored(stored[name], CPU) for name in tensors}  # the first is not overwritten by the last
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)
        assert torch.equal(on_device(found[name], CPU), tensor.float())
        assert torch.equal(read_stored(stored[name], CPU, 1, 3), tensor[1:3])
    joined = join([stored["matrix"], stored["matrix"]], by_columns=True)
    assert torch.equal(read_stored(joined, CPU), torch.cat([tensors["matrix"]] * 2, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_single_rows_come_and_go_in_the_order_of_their_numbers(tmp_path, dtype):
    torch.manual_seed(0)
    matrix, values, rows = torch.randn(50, 6).to(dtype), torch.randn(4, 6), torch.tensor([7, 49, 0, 3])
    save_file({"before": torch.randn(3), "matrix": matrix}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, CPU)
    assert torch.equal(checkpoint.gather("matrix", rows), matrix[rows].float())
    joined = join([checkpoint.tensors["matrix"], checkpoint.tensors["matrix"]])
    assert torch.equal(gather_stored(joined, rows + 47), torch.cat([matrix, matrix])[rows + 47])
    checkpoint.scatter("matrix", values, rows)
    assert torch.equal(checkpoint.read("matrix"), matrix.index_copy(0, rows, values.to(dtype)).float())
    with pytest.raises(NonFiniteError, match="matrix: a fitted value is not finite"):
        checkpoint.scatter("matrix", values * torch.inf, rows)


def test_single_rows_of_a_source_are_those_that_are_read_together(tmp_path):
    """Of a head that an adapter changes, in a vocabulary that has tokens which the source does not know."""
    base = save_seed(tmp_path / "seed", tie_word_embeddings=False)
    config = LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    get_peft_model(load_float32(base), config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    rows, others = torch.randint(0, 20, (40,), generator=torch.Generator().manual_seed(0)), torch.zeros(20, HIDDEN)
    for spec in (ExpertSpec(str(base)), ExpertSpec(str(tmp_path / "adapter"), base=str(base))):
        source = open_source("code", spec, None, lambda: tmp_path)
        dense = DenseSource(source, [Segment(2, 9, 5), Segment(10, 0, 3)], CPU)
        together = dense.rows("lm_head.weight", 0, others)
        assert together.any(dim=1).sum() == 8
        assert torch.equal(dense.gather("lm_head.weight", rows, others[rows]), together[rows])


def test_one_read_is_ahead_and_no_more():
    started, threads = [], set()

    def read(number: int) -> reading.Tensors:
        started.append(number)
        threads.add(threading.get_ident())
        return {"weight": torch.tensor(number)}

    with ReadAhead((f"read {number}", lambda number=number: read(number)) for number in range(4)) as weights:
        for number in range(4):
            assert weights.take(f"read {number}")["weight"] == number
            assert len(started) <= number + 2
    assert started == [0, 1, 2, 3]
    assert threading.get_ident() not in threads


def test_what_fails_in_the_thread_fails_where_it_is_taken():
    def fail() -> reading.Tensors:
        raise OSError("the disk is gone")

    with ReadAhead([("first", dict), ("second", fail), ("third", dict)]) as weights:
        weights.take("first")
        with pytest.raises(LookupError, match="third is wanted, but second is read next"):
            weights.take("third")
        with pytest.raises(OSError, match="the disk is gone"):
            weights.take("second")


def test_states_stay_on_the_device_where_they_fit(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(states, "free_memory", lambda device: 1000)
    assert place_of_states(gpu, 125) == gpu  # 500 bytes, half of what is free
    assert place_of_states(gpu, 126) == CPU
    assert place_of_states(CPU, 10**12) == CPU
    assert place_of_states(torch.device("mps"), 1) == CPU
    kept = States((3, 2, 4), CPU, CPU)
    kept[0:3] = torch.zeros(3, 2, 4)
    kept[1:3] = torch.ones(2, 2, 4)
    assert kept[0:2].sum(dim=(1, 2)).tolist() == [0, 8]


def test_no_document_sees_another():
    """As the same layer computes it with transformers' eager attention, one document at a time; within 1e-5."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=8)
    config._attn_implementation = ATTENTION
    layer, passage = LlamaDecoderLayer(config, 0), Passage(config, CPU)
    # the second window begins in the middle of a document
    runs = [[(0, 4, 0), (4, 5, 0), (5, 8, 0)], [(0, 3, 8), (3, 8, 0)]]
    positions = torch.tensor([[at + p for a, b, at in window for p in range(b - a)] for window in runs])
    stream = TokenStream("code", [0], torch.zeros(2, 8, dtype=torch.long), positions)
    assert stream.documents == [[(a, b) for a, b, _ in window] for window in runs]
    hidden = torch.randn(2, 8, 32)
    with torch.no_grad():
        found = passage.attention(layer, stream, hidden, slice(0, 2))
        layer.self_attn.config._attn_implementation = "eager"
        for window, documents in enumerate(runs):
            for start, stop, _ in documents:
                part = hidden[window : window + 1, start:stop]
                rotary = passage.rotary(part, positions[window : window + 1, start:stop])
                mask = torch.full((stop - start, stop - start), -torch.inf).triu(1)[None, None]
                expected, _ = layer.self_attn(layer.input_layernorm(part), rotary, mask)
                torch.testing.assert_close(found.added[window, start:stop], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.heads @ layer.self_attn.o_proj.weight.T, found.added.flatten(0, 1))


def test_a_digest_tells_checkpoints_apart_by_a_few_bytes_of_each_tensor(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tensors = {"experts": torch.randn(20, 64, 64), "norm": torch.randn(64), "x.mlp.gate.weight": torch.randn(2, 4)}

    def digest(folder: Path) -> str:
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        return Checkpoint(folder, CPU).digest()

    first = digest(tmp_path / "first")
    assert digest(tmp_path / "again") == first
    tensors["x.mlp.gate.weight"] += 1
    assert digest(tmp_path / "routed") == first  # statistics do not depend on the routers
    tensors["experts"][13] *= 1.01
    assert digest(tmp_path / "trained") != first
    # 20 places of 4,096 bytes of the experts, which have 327,680
    tensors["experts"][12, 20:] *= 1.01
    before = digest(tmp_path / "before")
    tensors["experts"][12, 20:] *= 1.01
    assert digest(tmp_path / "between") == before
