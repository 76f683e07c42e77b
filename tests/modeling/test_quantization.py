"""Quantisation reaches the experts, or is refused: they are most of the model."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers import quantizer_torchao

from tests.support.models import tiny_btx, tokens

with_torchao = pytest.mark.slow  # `make slow` installs it

EVERYWHERE = r"re:.*(self_attn\..*|mlp\.experts\.(gate_up|down))_proj"


@pytest.mark.parametrize(
    "config",
    [
        BitsAndBytesConfig(load_in_8bit=True),
        BitsAndBytesConfig(load_in_4bit=True),
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ],
)
def test_what_reaches_linear_layers_only_is_refused(config, tmp_path):
    tiny_btx().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^Quantisation by bitsandbytes would leave the experts .* use torchao with"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


@with_torchao
def test_torchao_that_passes_over_the_experts_is_refused(tmp_path):
    import torchao.quantization as torchao

    tiny_btx().save_pretrained(tmp_path)
    linear_only = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"^Quantisation by torchao would leave the experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=linear_only)


@with_torchao
@pytest.mark.skipif(
    "FqnToConfig" not in inspect.getsource(quantizer_torchao),
    reason="this transformers quantises nn.Linear alone",
)
@pytest.mark.filterwarnings("ignore::UserWarning:torchao")
def test_torchao_with_the_experts_named(tmp_path):
    """8-bit rows: within 3 % of the largest logit, and not equal."""
    import torchao.quantization as torchao

    tiny_btx(dtype=torch.bfloat16).bfloat16().save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    config = TorchAoConfig(torchao.FqnToConfig({EVERYWHERE: torchao.Int8WeightOnlyConfig()}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    for layer in model.model.layers:
        assert type(layer.mlp.experts.gate_up_proj).__name__ == type(layer.mlp.experts.down_proj).__name__
        assert type(layer.mlp.experts.gate_up_proj) is type(layer.self_attn.q_proj.weight) is not torch.nn.Parameter
        assert type(layer.mlp.gate.weight) is torch.nn.Parameter
    with torch.no_grad():
        expected, ours = plain(tokens()).logits, model(tokens()).logits
    assert 0 < (ours - expected).abs().median() < 0.03 * expected.abs().max()
    assert model.generate(tokens(1, 4), max_new_tokens=3).shape == (1, 7)
