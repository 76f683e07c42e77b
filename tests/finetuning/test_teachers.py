"""`btx train --teacher sources`: each domain is taught by its own source, as a plain computation says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from btx_merge.modeling import BTXForCausalLM
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from btx_merge import InputError, MergeRecipe, merge
from btx_merge.finetuning.data import DomainStream, MixedWindows, collate
from btx_merge.finetuning.recipe import TrainRecipe
from btx_merge.finetuning.run import train
from btx_merge.finetuning.teachers import Divergence, Teachers
from btx_merge.texts.references import DomainText
from tests.conftest import Family
from tests.finetuning.test_ranks import assert_the_same, on_one_rank, run, torchrun
from tests.finetuning.test_run import changed, losses_of, recipe, resumable
from tests.support.common import Told, grow, move_trainable, problems_of, save_seed, tensors_of, tiny_tokenizer

# plain gradient descent by 1, so that a weight moves by its gradient
BY_ITS_GRADIENT = {
    **{"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 0.0},
    **{"lr_scheduler_type": "constant", "warmup_steps": 0, "gradient_accumulation_steps": 2},
    "seed": 1,
}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Experts that are far from their seed, so that a teacher has something to say."""
    root = tmp_path_factory.mktemp("far")
    seed = save_seed(root / "seed")
    return Family(seed, *(grow(seed, root / name, noise=3, random_seed=len(name)) for name in ("code", "maths")))


@pytest.fixture(scope="module")
def merged(family):
    """A merge beside its sources, where its recipe finds them."""
    folder = family.seed.parent / "merged"
    merge(MergeRecipe(str(family.seed), family.experts), folder)
    return folder


@pytest.mark.parametrize("vocabulary", [11, 8])
def test_the_divergence_as_torch_has_it(vocabulary):
    """Value and gradient, also where the source lacks the last rows, which then have no probability there."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, generator=generator, dtype=torch.float32, requires_grad=True)
    taught = 3 * torch.randn(5, vocabulary, generator=generator)
    ours = Divergence.apply(logits, taught)
    (gradient,) = torch.autograd.grad(2 * ours, logits)
    p = torch.zeros(5, 11)
    p[:, :vocabulary] = taught.softmax(dim=-1)
    expected = F.kl_div(logits.log_softmax(dim=-1), p, reduction="sum")
    (theirs,) = torch.autograd.grad(2 * expected, logits)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["all", "routers"])
def test_loss_and_gradients_of_a_step(family, merged, texts, tmp_path, mode):
    """Four windows of two domains in two micro-batches, token by token, by models that transformers loads.

    Losses within 1e-5, gradients within 1e-5 (float32, sums in another order; the largest are about 0.1).
    """
    asked = recipe(merged, texts, train=mode, teacher="sources", router_aux_loss_coef=0, arguments=BY_ITS_GRADIENT)
    report = train(asked, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    streams = [DomainStream(text, tokenizer, 32, asked.holdout) for text in asked.data]
    rows = [row for row, _ in zip(MixedWindows(streams, asked.shuffle, 1), range(4), strict=False)]
    assert {row["domain"] for row in rows} == {0, 1}
    model = BTXForCausalLM.from_pretrained(merged).train()
    teachers = [LlamaForCausalLM.from_pretrained(folder).eval() for folder in (family.code, family.math)]
    language, divergence, count = torch.zeros(()), torch.zeros(()), 0
    for row in rows:
        batch = collate([row])
        domain = int(batch.pop("domain"))
        labels = batch.pop("labels")[0]
        ours = model(**batch, use_cache=False).logits[0].softmax(dim=-1)
        with torch.no_grad():
            theirs = teachers[domain](**batch, use_cache=False).logits[0].softmax(dim=-1)
        for place, label in enumerate(labels[1:].tolist()):
            if label != -100:
                language = language - ours[place, label].log()
                divergence = divergence + (theirs[place] * (theirs[place] / ours[place]).log()).sum()
                count += 1
    loss = (language + divergence) / count
    loss.backward()
    loss, language, divergence = (float(each.detach()) for each in (loss, language, divergence))
    assert divergence > 0.02 * language
    entry = next(entry for entry in report.history if "loss" in entry)
    assert entry["loss"] == pytest.approx(loss, rel=1e-5)
    assert entry["lm_loss"] == pytest.approx(language / count, rel=1e-5)
    assert entry["teacher_loss"] == pytest.approx(divergence / count, rel=1e-5)
    before, after = tensors_of(merged), tensors_of(tmp_path / "out")
    trained = [name for name in before if mode == "all" or name.endswith("mlp.gate.weight")]
    assert max(float((before[name] - after[name]).abs().max()) for name in trained) > 1e-3
    for name in trained:
        gradient = model.get_parameter(name).grad
        torch.testing.assert_close(before[name] - after[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.usefixtures("painted")
def test_what_the_result_says(merged, texts, tmp_path):
    lines: list[str] = []
    report = train(recipe(merged, texts, teacher="sources"), tmp_path / "out", reporter=Told(line=lines.append))
    assert "taught by the sources code, math, of which one is in memory at a time" in lines
    head = next(line for line in lines if "balancing" in line)
    assert head.split()[1:6] == ["loss", "LM", "loss", "teacher", "balancing"]
    for entry in report.history:
        if "loss" in entry:
            both = entry["lm_loss"] + entry["teacher_loss"] + 0.01 * entry["aux_loss"]
            assert entry["loss"] == pytest.approx(both, rel=1e-5)
    assert 0 < report.parts["teachers"] < report.seconds
    (written,) = yaml.safe_load((tmp_path / "out/btx_recipe.yaml").read_text())["training"]
    assert written["teacher"] == "sources"
    card = (tmp_path / "out/README.md").read_text()
    assert "Each domain was taught by its own source" in card
    assert "| step | loss | LM loss | teacher's loss | balancing loss |" in card
    lines.clear()
    train(recipe(merged, texts, router_aux_loss_coef=0), tmp_path / "plain", reporter=Told(line=lines.append))
    assert not any("balancing" in line or "teacher" in line for line in lines)  # no columns of nothing
    assert "taught" not in (tmp_path / "plain/README.md").read_text()


def test_a_block_of_steps_ahead_changes_nothing(merged, texts, tmp_path, monkeypatch):
    """Blocks of two steps, of which the last is shorter, beside one for the whole run."""
    asked = resumable(merged, texts, max_steps=5)
    asked = TrainRecipe(**{**asked.__dict__, "teacher": "sources"})
    whole = train(asked, tmp_path / "whole")
    blocks: list[int] = []
    look_at = Teachers.look_at

    def told(self: Teachers, batches: list[dict[str, Any]]) -> None:
        blocks.append(len(batches))
        look_at(self, batches)

    monkeypatch.setattr(Teachers, "look_at", told)
    monkeypatch.setattr("btx_merge.finetuning.teachers._BLOCK_BYTES", 2 * (4 * 32) * 64 * 4 + 1)
    parts = train(asked, tmp_path / "parts")
    assert blocks == [4, 4, 2]  # of two micro-batches a step
    assert losses_of(parts) == losses_of(whole)
    assert changed(tmp_path / "whole", tmp_path / "parts") == set()


def test_a_block_has_as_many_steps_as_memory_holds(family):
    from btx_merge.sources.opening import open_whole

    for tokens, steps in ((4096, 2_000_000_000 // (4096 * 64 * 4)), (10**12, 1)):
        teachers = Teachers([open_whole("code", str(family.code))], torch.float32, torch.device("cpu"), tokens)
        assert teachers.steps_ahead == steps


def test_resumed(merged, texts, tmp_path, monkeypatch):
    """A run that was stopped after step 4, between two log lines: the same losses and bytes."""
    from btx_merge.finetuning.trainer import BTXTrainer

    asked = TrainRecipe(**{**resumable(merged, texts).__dict__, "teacher": "sources"})
    whole = train(asked, tmp_path / "whole")
    plain = BTXTrainer.compute_loss

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.model.training and self.state.global_step == 4:
            raise KeyboardInterrupt
        return plain(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BTXTrainer, "compute_loss", interrupted)
        with pytest.raises(BaseException, match="Step 3 is kept"):
            train(asked, tmp_path / "out")
    (line,) = problems_of(train, resumable(merged, texts), tmp_path / "out", resume=True)
    assert "teacher: None; expected 'sources', as the run began" in line
    resumed = train(asked, tmp_path / "out", resume=True)
    assert losses_of(resumed) == losses_of(whole)
    assert changed(tmp_path / "whole", tmp_path / "out") == set()


@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_as_one(merged, texts, tmp_path, sharded):
    alone = on_one_rank(merged, texts, tmp_path / "alone", teacher="sources")
    flags = ["-o", tmp_path / "out", "--per-device-train-batch-size=2", "--teacher=sources"]
    ours = run(torchrun(), merged, texts, *flags, *(["--fsdp-size=2"] if sharded else []))
    assert ours["world_size"] == 2
    assert_the_same(ours, tmp_path / "out", alone, merged)


def test_an_adapter_as_source_and_as_result(family, texts, tmp_path):
    """The source is a LoRA on the seed, the result a LoRA on the merge; the seed teaches its own domain."""
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(family.seed), LoraConfig(target_modules=["q_proj", "up_proj"], r=2)
    )
    torch.manual_seed(0)
    move_trainable(adapted)
    adapted.save_pretrained(tmp_path / "code")
    merge(MergeRecipe(str(family.seed), {"code": str(tmp_path / "code")}), tmp_path / "merged")
    seed = {"seed": str(family.seed)}
    data = {"code": texts["code"], "seed": texts["math"]}
    asked = recipe(
        tmp_path / "merged", data, train="lora", teacher="sources", sources=seed, arguments={"max_steps": 2}
    )
    report = train(asked, tmp_path / "out")
    first = next(entry for entry in report.history if "loss" in entry)
    assert 0 < first["teacher_loss"] < 1
    assert yaml.safe_load((tmp_path / "out/btx_recipe.yaml").read_text())["training"][0]["teacher"] == "sources"


@pytest.mark.parametrize("mode", ["split", "blend"])
def test_a_source_of_several_experts_teaches(family, texts, tmp_path, mode):
    merge(MergeRecipe(str(family.seed), family.experts, expert_mode=mode), tmp_path / "merged")
    moved = {"seed": str(family.seed), **family.experts}
    asked = recipe(tmp_path / "merged", texts, teacher="sources", sources=moved, arguments={"max_steps": 1})
    report = train(asked, tmp_path / "out")
    assert next(entry for entry in report.history if "loss" in entry)["teacher_loss"] > 0


# Refused before anything is written


def refused(asked: TrainRecipe, out: Path) -> list[str]:
    lines = problems_of(train, asked, out)
    assert not out.exists()
    assert not list(out.parent.glob("*.btx-training"))
    return lines


def test_a_domain_without_a_source(merged, texts, tmp_path):
    data = (DomainText("code", (texts["code"],)), DomainText("law", (texts["math"],)))
    asked = TrainRecipe(**{**recipe(merged, texts).__dict__, "data": data, "teacher": "sources"})
    (line,) = refused(asked, tmp_path / "out")
    assert line == (
        "recipe: data: no source law to teach it; expected one of seed, code, math. "
        "Give each domain the name of its source, or leave out --teacher."
    )


def test_a_source_that_has_moved(family, texts, tmp_path):
    code = shutil.copytree(family.code, tmp_path / "code")
    merge(MergeRecipe(str(family.seed), {"code": str(code), "math": str(family.math)}), tmp_path / "merged")
    code.rename(tmp_path / "elsewhere")
    there = {"seed": str(family.seed), "math": str(family.math)}
    asked = recipe(tmp_path / "merged", texts, teacher="sources", sources=there, arguments={"max_steps": 1})
    (line,) = refused(asked, tmp_path / "out")
    assert line.startswith("code: ")
    assert line.endswith("Give --source code=MODEL where it lies now, or leave out --teacher.")
    found = TrainRecipe(**{**asked.__dict__, "sources": {**there, "code": str(tmp_path / "elsewhere")}})
    train(found, tmp_path / "out")
    warnings: list[str] = []
    other = TrainRecipe(**{**asked.__dict__, "sources": {**there, "code": str(family.math)}})
    train(other, tmp_path / "other", reporter=Told(warn=warnings.append))
    assert any("not the model that this recipe was written for" in line for line in warnings)
    only_math = {"math": texts["math"]}
    data = tuple(DomainText(name, (file,)) for name, file in only_math.items())
    train(TrainRecipe(**{**asked.__dict__, "data": data}), tmp_path / "math")  # code is not asked for


def test_a_source_with_other_tokens(family, texts, tmp_path):
    added = ["<|a|>", "<|b|>"]
    code = grow(
        family.seed,
        tmp_path / "code",
        change=lambda model: model.resize_token_embeddings(130),
        tokenizer=tiny_tokenizer(added),
    )
    merge(MergeRecipe(str(family.seed), {"code": str(code), "math": str(family.math)}), tmp_path / "merged")
    there = {"seed": str(family.seed), "math": str(family.math)}
    (line,) = refused(recipe(tmp_path / "merged", texts, teacher="sources", sources=there), tmp_path / "out")
    assert line.startswith("math: ")
    assert "has other tokens than the merged model, such as '<|" in line
    assert line.endswith("expected the same tokens in a teacher. Leave out --teacher.")


def test_sources_without_a_teacher(merged, texts):
    with pytest.raises(InputError, match=r"sources: given without a teacher. Give --teacher sources"):
        recipe(merged, texts, sources={"code": "somewhere"})


def test_a_train_file_names_sources_as_it_sees_them(family, texts, tmp_path):
    from btx_merge.cli.training import read_train_file

    shutil.copytree(family.code, tmp_path / "models/code")
    (tmp_path / "models/train.yaml").write_text("model: .\nsources: {code: code, math: org/name}\n")
    values = read_train_file(tmp_path / "models/train.yaml")
    assert values["sources"] == {"code": str(tmp_path / "models/code"), "math": "org/name"}
