"""Loading through transformers: with this package, without it as remote code, saved again, in any order of imports.

What must be seen in a fresh process runs in one; each process checks many things, for importing torch takes long.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from btx_merge import MergeRecipe, merge
from tests.support import warm
from tests.support.common import WITHOUT_BTX_MERGE, files_of, load_float32, logits_of

AUTO_MAP = {
    "AutoConfig": "configuration_btx.BTXConfig",
    "AutoModel": "modeling_btx.BTXModel",
    "AutoModelForCausalLM": "modeling_btx.BTXForCausalLM",
    "AutoModelForSequenceClassification": "modeling_btx.BTXForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_btx.BTXForTokenClassification",
}
MODEL_CODE = {"configuration_btx.py", "experts_btx.py", "modeling_btx.py", "routing_btx.py"}


@pytest.fixture(scope="module")
def merged(family, tmp_path_factory):
    """A merged model with its logits beside it, for other processes to compare with."""
    out = tmp_path_factory.mktemp("merged") / "llama-btx"
    merge(MergeRecipe(str(family.seed), family.experts), out)
    torch.save(logits_of(load_float32(out)), out.parent / "logits.pt")
    return out


def run(script: str, folder: Path, home: Path, level: str = "transformers") -> list[str]:
    """What a fresh Python prints; it runs beside the model, with nothing of an earlier run in its cache of code."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(home / "modules")}
    command = [sys.executable, "-W", "error:::btx_merge", "-c", script]
    done = warm.run(command, cwd=folder.parent, env=environment, level=level)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


CHECK = """
import torch
logits = torch.load("logits.pt")
def same(model):
    ids = (torch.arange(60).reshape(2, 30) * 37) % 128
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, logits, atol=1e-6, rtol=0)
"""


def test_with_the_package_imported_first(merged, tmp_path):
    lines = run(
        "import btx_merge, sys\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        + CHECK
        + """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
config = AutoConfig.from_pretrained("llama-btx")
print(type(config).__module__, type(config).__name__)
print(type(AutoModel.from_pretrained("llama-btx")).__name__)
model = AutoModelForCausalLM.from_pretrained("llama-btx")
print(type(model).__module__, type(model).__name__)
same(model)
generator = pipeline("text-generation", "llama-btx")
print(type(generator.model).__name__)
text = generator("w1 w2 w3", max_new_tokens=4, do_sample=False)[0]["generated_text"]
print(text.startswith("w1 w2 w3"), len(text.split()) > 3)
print(AutoConfig.for_model("btx", num_experts=7).num_local_experts)
""",
        merged,
        tmp_path,
        level="python",
    )
    assert lines == [
        "btx_merge.modeling.configuration_btx BTXConfig",
        "BTXModel",
        "btx_merge.modeling.modeling_btx BTXForCausalLM",
        "BTXForCausalLM",
        "True True",
        "7",
    ]


def test_with_the_package_imported_last_and_a_llama_before(family, merged, tmp_path):
    """The Auto classes have been used, and Llamas built: they have no experts, and must not decide for us. What a
    bare LlamaModel has found out about itself, transformers keeps on its class, which ours inherit from."""
    lines = run(
        CHECK
        + f"""
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
llama = AutoModelForCausalLM.from_pretrained({str(family.seed)!r})
AutoModel.from_pretrained({str(family.seed)!r})
import btx_merge
print(AutoModel.from_pretrained("llama-btx").config._experts_implementation)
print(type(AutoConfig.from_pretrained("llama-btx")).__name__)
model = AutoModelForCausalLM.from_pretrained("llama-btx")
print(type(llama).__name__, type(model).__name__)
print(model.config._experts_implementation, llama.config._experts_implementation)
same(model)
trusted = AutoModelForCausalLM.from_pretrained("llama-btx", trust_remote_code=True)
print(type(trusted).__module__)
""",
        merged,
        tmp_path,
    )
    assert lines[:-1] == ["grouped_mm", "BTXConfig", "LlamaForCausalLM BTXForCausalLM", "grouped_mm eager"]
    assert "btx" in lines[-1]


def test_remote_code_without_the_package(merged, tmp_path):
    """Load, save, load what was saved, three times over, and use it; then what was saved has all that it needs."""
    lines = run(
        WITHOUT_BTX_MERGE
        + CHECK
        + """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
trust = {"trust_remote_code": True}
print(type(AutoConfig.from_pretrained("llama-btx", **trust)).__name__)
print(type(AutoModel.from_pretrained("llama-btx", **trust)).__name__)
folder = "llama-btx"
for number in range(3):
    model = AutoModelForCausalLM.from_pretrained(folder, **trust)
    same(model)
    folder = f"again{number}"
    model.save_pretrained(folder)
print(type(model).__name__, model.config._experts_implementation)
print(model.config.num_experts_per_tok, model.config.expert_names)
ids = torch.tensor([[1, 2, 3]])
out = model.train()(ids, labels=ids)
print(out.aux_loss.item() >= 1.9, out.loss.requires_grad)
generator = pipeline("text-generation", "llama-btx", **trust)
print(type(generator.model).__name__)
model.model.save_pretrained("decoder")
print(type(AutoModel.from_pretrained("decoder", **trust)).__name__)
""",
        merged,
        tmp_path,
    )
    assert lines == [
        "BTXConfig",
        "BTXModel",
        "BTXForCausalLM grouped_mm",
        "2 ['seed', 'code', 'math']",
        "True True",
        "BTXForCausalLM",
        "BTXModel",
    ]
    for folder in ("again0", "again1", "again2"):
        assert files_of(merged.parent / folder).keys() >= {"config.json", "model.safetensors", *MODEL_CODE}
        assert json.loads((merged.parent / folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        for name in MODEL_CODE:
            assert (merged.parent / folder / name).read_text() == (merged / name).read_text()


def test_classifiers_by_remote_code(merged, tmp_path):
    lines = run(
        WITHOUT_BTX_MERGE
        + """
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
for kind in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
    for folder in ("llama-btx", kind.__name__):
        model = kind.from_pretrained(folder, num_labels=3, trust_remote_code=True).eval()
        print(type(model).__name__, *model(torch.tensor([[1, 2, 3, 4]])).logits.shape)
        model.save_pretrained(kind.__name__)
""",
        merged,
        tmp_path,
    )
    assert lines == [*2 * ["BTXForSequenceClassification 1 3"], *2 * ["BTXForTokenClassification 1 4 3"]]


def test_saved_again_with_the_package(merged, tmp_path):
    """Everything that loading as remote code needs is saved too, each time."""
    folder = merged
    for number in range(2):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.num_experts_per_tok = 1 + number
        folder = tmp_path / f"again{number}"
        model.save_pretrained(folder, max_shard_size="200KB")
    assert set(files_of(folder)) >= {"config.json", "model.safetensors.index.json", *MODEL_CODE}
    for name in MODEL_CODE:
        assert (folder / name).read_text() == (merged / name).read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["num_experts_per_tok"] == 2
    assert config["expert_names"] == ["seed", "code", "math"]
    assert torch.equal(logits_of(load_float32(folder)), logits_of(load_float32(merged)))


def test_a_bare_decoder_saved_and_loaded(merged, tmp_path):
    decoder = AutoModel.from_pretrained(merged).eval()
    decoder.save_pretrained(tmp_path / "decoder")
    again, info = AutoModel.from_pretrained(tmp_path / "decoder", output_loading_info=True)
    assert not info["missing_keys"]
    ids = torch.arange(10)[None]
    assert torch.equal(again.eval()(ids).last_hidden_state, decoder(ids).last_hidden_state)
    assert json.loads((tmp_path / "decoder" / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_in_this_process(merged):
    config = AutoConfig.from_pretrained(merged)
    assert type(config).__module__ == "btx_merge.modeling.configuration_btx"
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__module__ == "btx_merge.modeling.modeling_btx"
    assert model.config._experts_implementation == "grouped_mm"


def test_importing_again_is_harmless():
    """A notebook reloads modules."""
    import importlib

    import btx_merge.modeling

    import btx_merge

    importlib.reload(btx_merge)
    importlib.reload(btx_merge.modeling)
    assert AutoConfig.for_model("btx").model_type == "btx"
    with pytest.raises(ValueError, match="llamb"):
        AutoConfig.for_model("llamb")
