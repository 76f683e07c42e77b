"""The models beside a merged one: as transformers loads them, value by value."""

from __future__ import annotations

import shutil

import pytest
import torch

from btx_merge import MergeRecipe, merge
from btx_merge.errors import InputError
from btx_merge.measuring.models import load_folder, load_mean, load_source
from btx_merge.measuring.sources import open_sources, source_specs
from btx_merge.model.merged import open_merged
from btx_merge.sources.locate import Located
from tests.support.common import VOCAB, grow, load_float32, logits_of, move_trainable, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def merged(family):
    """Beside its sources, whose folders it knows by their names."""
    folder = family.seed.parent / "measured"
    merge(MergeRecipe(str(family.seed), family.experts), folder)
    return folder


def opened(folder, scratch, **moved):
    return open_sources(open_merged(Located(folder)), moved, lambda: scratch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sources_are_what_transformers_loads(family, merged, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    sources, warnings = opened(merged, tmp_path)
    assert list(sources) == ["seed", "code", "math"]
    assert warnings == []
    for source, folder in zip(sources.values(), (family.seed, family.code, family.math), strict=True):
        ours = load_source(source, dtype, CPU)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        for name, tensor in ours.state_dict().items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, state[name]), name
        assert torch.equal(logits_of(ours), logits_of(theirs.eval()))


def test_the_mean_is_that_of_the_state_dicts(family, merged, tmp_path):
    sources, _ = opened(merged, tmp_path)
    ours = load_mean(list(sources.values()), torch.float32, CPU).state_dict()
    states = [load_float32(folder).state_dict() for folder in (family.seed, family.code, family.math)]
    for name, tensor in ours.items():
        mean = sum(state[name].double() for state in states) / 3
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


def test_a_token_that_one_source_has_is_the_mean_over_that_one(family, tmp_path):
    grown = grow(
        family.seed,
        tmp_path / "grown",
        change=lambda model: model.resize_token_embeddings(VOCAB + 1, mean_resizing=False),
        tokenizer=tiny_tokenizer(["new"]),
    )
    merge(MergeRecipe(str(family.seed), {"code": str(family.code), "grown": str(grown)}), tmp_path / "merged")
    places = {"seed": str(family.seed), "code": str(family.code)}
    sources, _ = opened(tmp_path / "merged", tmp_path, **places)
    soup = load_mean(list(sources.values()), torch.float32, CPU)
    embedding = soup.get_input_embeddings().weight
    assert len(embedding) == VOCAB + 1
    assert torch.equal(embedding[VOCAB], load_float32(grown).get_input_embeddings().weight[VOCAB])
    assert load_source(sources["grown"], torch.float32, CPU).config.vocab_size == VOCAB + 1


def test_tied_sources_have_one_embedding(tmp_path):
    from tests.support.common import save_seed

    seed = save_seed(tmp_path / "seed", tie_word_embeddings=True)
    code = grow(seed, tmp_path / "code")
    merge(MergeRecipe(str(seed), {"code": str(code)}), tmp_path / "merged")
    sources, _ = opened(tmp_path / "merged", tmp_path)
    ours = load_source(sources["code"], torch.float32, CPU)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert torch.equal(logits_of(ours), logits_of(load_float32(code)))


def test_an_adapter_is_loaded_over_its_base(family, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = load_float32(family.seed)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    move_trainable(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(MergeRecipe(str(family.seed), {"code": str(tmp_path / "adapter")}), tmp_path / "merged")
    sources, _ = opened(tmp_path / "merged", tmp_path, seed=str(family.seed), code=str(tmp_path / "adapter"))
    ours = load_source(sources["code"], torch.float32, CPU)
    expected = logits_of(adapted.eval())
    torch.testing.assert_close(logits_of(ours), expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order


def test_a_merged_model_is_loaded_in_the_dtype_that_is_asked_for(merged):
    model = load_folder(Located(merged), torch.bfloat16, CPU)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert not model.training


def test_a_source_that_has_moved_is_named_with_its_remedy(family, merged, tmp_path):
    copy = shutil.copytree(merged, tmp_path / "merged")
    with pytest.raises(InputError, match=r"code: llama-code: .*--source code=MODEL") as caught:
        opened(copy, tmp_path)
    assert [problem.source for problem in caught.value.problems] == ["seed", "code", "math"]
    sources, warnings = opened(copy, tmp_path, seed=str(family.seed), **family.experts)
    assert sources["code"].located.folder == family.code
    assert warnings == []
    with pytest.raises(InputError, match=r"--source: no source coed; expected one of seed, code, math"):
        opened(merged, tmp_path, coed="somewhere")


def test_another_model_in_a_source_s_place_is_a_warning(family, merged, tmp_path):
    _, warnings = opened(merged, tmp_path, code=str(family.math))
    (warning,) = warnings
    assert (warning.source, warning.remedy) == ("code", "Give the one that was merged by --source.")


def test_a_model_without_a_recipe_names_no_sources(merged, tmp_path):
    copy = shutil.copytree(merged, tmp_path / "merged")
    (copy / "btx_recipe.yaml").unlink()
    with pytest.raises(InputError, match=r"no recipe.*--no-sources"):
        source_specs(open_merged(Located(copy)), {})


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="transformers cannot load it"):
        load_folder(Located(tmp_path), torch.float32, CPU)
