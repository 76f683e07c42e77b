"""BTXConfig: every own field is validated whenever it is set, and the files it travels in."""

from __future__ import annotations

import ast
import copy
import json
import re
from pathlib import Path

import pytest
import transformers
from btx_merge.modeling import BTXConfig, configuration_btx

from btx_merge.merging import recipe
from btx_merge.model.files import MODEL_CODE, model_code_folder

BAD = [
    ("num_local_experts", 0, "an integer of at least"),
    ("num_local_experts", 4.0, "an integer of at least"),
    ("num_local_experts", True, "an integer of at least"),
    ("num_local_experts", None, "an integer of at least"),
    ("num_experts", 0, "an integer of at least"),
    ("num_experts_per_tok", 0, "an integer in [1, 4], the number of experts"),
    ("num_experts_per_tok", 5, "an integer in [1, 4], the number of experts"),
    ("num_experts_per_tok", 2.0, "an integer in [1, 4], the number of experts"),
    ("num_experts_per_tok", True, "an integer in [1, 4], the number of experts"),
    ("num_experts_per_tok", "2", "an integer in [1, 4], the number of experts"),
    ("router_type", "top-k", "one of top_k, switch, soft, sample_top_1"),
    ("router_type", None, "one of top_k, switch, soft, sample_top_1"),
    *((key, value, "") for key in ("router_pre_softmax", "router_selection_bias") for value in (1, None, "true")),
    *(("num_chunks", value, "") for value in (0, -2, 1.0, True, None, "2")),
    *(("expert_capacity_factor", value, "") for value in (0, -1.5, float("nan"), float("inf"), "1.5", True)),
    *(("router_z_loss_coef", value, "a number of at least 0") for value in (-0.1, float("nan"), "0", True, None)),
    *(("router_grad", value, "one of sparse, dense") for value in ("full", True, None)),
    *(("router_aux_loss_scope", value, "one of micro_batch, global_batch") for value in ("global", None)),
    *(("active_experts", value, "") for value in ([], "a", 1, ["a"], [4], [-1], [1, 1], [True], [0.0], [None])),
    ("mlp_bias", True, ""),
    ("router_aux_loss_coef", -0.01, "a number of at least 0"),
    ("router_aux_loss_coef", float("nan"), "a number of at least 0"),
    ("router_aux_loss_coef", float("inf"), "a number of at least 0"),
    ("router_aux_loss_coef", "0.01", "a number of at least 0"),
    ("router_aux_loss_coef", True, "a number of at least 0"),
    ("router_aux_loss_coef", None, "a number of at least 0"),
    ("output_router_logits", 1, "a bool"),
    ("output_router_logits", None, "a bool"),
    ("expert_names", ["a", "b"], "one expert name for each of the 4 experts"),
    ("expert_names", "abcd", "a list of names, or None"),
    ("expert_names", [1, 2, 3, 4], "a list of names, or None"),
    ("expert_names", 4, "a list of names, or None"),
]


@pytest.mark.parametrize(("field", "value", "expected"), BAD)
def test_a_bad_value_is_refused_at_construction_and_on_assignment(field, value, expected):
    with pytest.raises(ValueError, match=f"^{field} is {re.escape(repr(value))}; expected"):
        BTXConfig(**{field: value})
    config = BTXConfig()
    before = config.to_dict()
    with pytest.raises(ValueError, match=re.escape(f"{field} is {value!r}; expected {expected}")):
        setattr(config, field, value)
    assert config.to_dict() == before  # what is refused is not kept


@pytest.mark.parametrize("values", [{"hidden_size": 65, "num_attention_heads": 4}, {"hidden_size": "64"}, {}])
def test_the_inherited_fields_are_validated_as_ever(values):
    """As strictly as this transformers validates a Llama's: not before 5.1."""

    def outcome(kind):
        try:
            kind(**values)
        except Exception as error:
            return type(error)
        return None

    assert outcome(BTXConfig) == outcome(transformers.LlamaConfig)


def test_number_of_experts_and_their_names_belong_together():
    config = BTXConfig(num_local_experts=3, expert_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="one expert name for each of the 4 experts"):
        config.num_local_experts = 4
    assert config.num_local_experts == 3
    config.expert_names = None
    config.num_local_experts = 4
    with pytest.raises(ValueError, match="num_local_experts is 1; expected an integer of at least 2"):
        config.num_local_experts = 1  # below num_experts_per_tok
    config.num_experts_per_tok = 1
    config.num_local_experts = 1


def test_active_experts_are_experts_that_there_are():
    config = BTXConfig(expert_names=["a", "b", "c", "d"], active_experts=["d", 0])
    for key, value in {"expert_names": ["a", "b", "c", "x"], "num_local_experts": 3}.items():
        with pytest.raises(ValueError, match=rf"^{key} is .*; expected one"):
            setattr(config, key, value)
    with pytest.raises(ValueError, match=re.escape("expert_names is None; expected one that has the active experts")):
        config.expert_names = None
    assert config.expert_numbers(config.active_experts) == [0, 3]


def test_a_selection_bias_needs_a_selection():
    with pytest.raises(ValueError, match="router_selection_bias is True; expected False except with top_k or switch"):
        BTXConfig(router_type="soft", router_selection_bias=True)
    config = BTXConfig(router_selection_bias=True)
    with pytest.raises(ValueError, match="router_type is 'soft'; expected top_k or switch where"):
        config.router_type = "soft"


def test_defaults_are_a_contract():
    config = BTXConfig()
    own = {key: value for key, value in vars(config).items() if key not in vars(transformers.LlamaConfig())}
    assert {key: own[key] for key in OWN_DEFAULTS} == OWN_DEFAULTS
    assert config.model_type == "btx"


OWN_DEFAULTS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_type": "top_k",
    "router_pre_softmax": False,
    "num_chunks": 1,
    "expert_capacity_factor": 1.5,
    "router_z_loss_coef": 0.0,
    "router_grad": "sparse",
    "router_selection_bias": False,
    "router_aux_loss_scope": "micro_batch",
    "active_experts": None,
    "router_aux_loss_coef": 0.01,
    "output_router_logits": False,
    "expert_names": None,
}


@pytest.mark.parametrize("router_type", ["top_k", "switch", "soft", "sample_top_1"])
def test_every_field_travels(tmp_path, router_type):
    values = {
        "router_type": router_type,
        "router_pre_softmax": True,
        "num_chunks": 2,
        "expert_capacity_factor": None,
        "router_z_loss_coef": 0.001,
        "router_grad": "dense",
        "router_selection_bias": router_type in ("top_k", "switch"),
        "router_aux_loss_scope": "global_batch",
        "expert_names": ["a", "b", "c", "d"],
        "active_experts": ["d", "b"],
    }
    config = BTXConfig(**values)
    assert {key: getattr(config, key) for key in values} == values
    config.save_pretrained(tmp_path)
    loaded = BTXConfig.from_pretrained(tmp_path)
    assert {key: getattr(loaded, key) for key in values} == values
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_a_recipe_knows_the_same_routings():
    """It has a list of its own, because reading a recipe must not import torch."""
    assert recipe.ROUTER_TYPES == configuration_btx.ROUTER_TYPES


def test_num_experts_is_another_name():
    config = BTXConfig(num_experts=6)
    assert config.num_local_experts == config.num_experts == 6
    config.num_experts = 5
    assert config.num_local_experts == 5
    assert config.to_dict()["num_local_experts"] == 5
    assert "num_experts" not in config.to_dict()


def test_save_and_load(tmp_path):
    config = BTXConfig(num_experts=3, num_experts_per_tok=1, expert_names=["a", "b", "c"], hidden_size=64)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "btx"
    assert values["auto_map"] == {"AutoConfig": "configuration_btx.BTXConfig"}
    assert (tmp_path / "configuration_btx.py").read_text() == (
        model_code_folder() / "configuration_btx.py"
    ).read_text()
    assert {key: values[key] for key in OWN_DEFAULTS} == {
        **OWN_DEFAULTS,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "expert_names": ["a", "b", "c"],
    }
    assert BTXConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert BTXConfig.from_pretrained(tmp_path, num_experts_per_tok=3).num_experts_per_tok == 3
    with pytest.raises(ValueError, match="num_experts_per_tok is 4"):
        BTXConfig.from_pretrained(tmp_path, num_experts_per_tok=4)


@pytest.mark.parametrize("name", MODEL_CODE)
def test_the_code_that_travels_needs_torch_and_transformers_only(name):
    """Where a checkpoint is downloaded, nothing else may be there; not einops, and not this package."""
    tree = ast.parse((model_code_folder() / name).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert f"{node.module}.py" in MODEL_CODE  # a file beside it, which travels too
    assert imported <= {"collections", "math", "typing", "torch", "transformers"}


def test_no_isinstance_of_the_config():
    """Remote code imports config and model under different packages: such a check is never true there."""
    for file in model_code_folder().glob("*.py"):
        assert "isinstance(config" not in file.read_text()


def test_an_older_transformers_is_told_in_one_line(monkeypatch):
    source = Path(model_code_folder() / "configuration_btx.py").read_text()
    monkeypatch.setattr("transformers.__version__", "4.57.1")  # it replaces its own module while it is imported
    with pytest.raises(ImportError) as error:
        exec(compile(source, "configuration_btx.py", "exec"), {"__name__": "configuration_btx"})
    assert str(error.value) == (
        "A BTX model needs transformers 5 or newer, and this is 4.57.1: pip install -U transformers"
    )
