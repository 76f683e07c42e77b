"""What a fit says it has lost, against whole models run by transformers, one held-out document at a time."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
from typer.testing import CliRunner

from btx_merge import FitRecipe, Options, fit, merge
from btx_merge.cli.app import app
from btx_merge.model.held_out import DomainLoss, fit_advice
from btx_merge.texts.references import DomainText, documents
from btx_merge.texts.windows import packed_windows
from tests.fitting.test_run import DOMAINS, WINDOW, recipe_of, write_texts
from tests.support.common import Told, grow, load_float32, save_seed, tiny_tokenizer


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A seed and two experts far from it, tied, and text of both domains."""
    folder = tmp_path_factory.mktemp("tied")
    save_seed(folder / "seed", tie_word_embeddings=True)
    for number, name in enumerate(DOMAINS):
        grow(folder / "seed", folder / name, noise=0.5, random_seed=number + 1)
    return folder, write_texts(folder)


def held_out_documents(text: DomainText) -> list[torch.Tensor]:
    """The last tenth of the windows, cut where positions begin anew."""
    tokenizer = tiny_tokenizer()
    windows = list(packed_windows(documents(text, tokenizer), tokenizer, WINDOW))
    out = []
    for ids, positions in windows[-max(1, round(0.1 * len(windows))) :]:
        starts = [i for i, position in enumerate(positions) if position == 0] + [len(ids)]
        out += [torch.tensor([ids[a:b]]) for a, b in itertools.pairwise(starts)]
    return out


@torch.no_grad()
def slow_bits(model, text: DomainText, **call) -> float:
    """Bits per byte of everything behind each document's first token."""
    tokenizer = tiny_tokenizer()
    nats, count = 0.0, 0
    for ids in held_out_documents(text):
        logs = model(input_ids=ids, **call).logits.double().log_softmax(dim=-1)[0, :-1]
        nats -= float(logs.gather(1, ids[0, 1:, None]).sum())
        whole, first = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[0], ids[0, :1]))
        count += len(whole.encode()) - len(first.encode())
    return nats / math.log(2) / count


@pytest.mark.parametrize(
    "values",
    [
        {"combine": "regmean_merged", "head": "fitted", "fit_through": "router"},
        {"combine": "regmean_merged", "fit_through": "expert"},
        {"combine": "regmean", "fit_through": "router"},
        {"fit_through": "expert"},
        {"fit_through": "router", "expert_mode": "split"},
    ],
    ids=lambda values: ", ".join(values.values()),
)
def test_losses_are_those_of_whole_models(grown, tmp_path, values):
    folder, texts = grown
    report = merge(recipe_of(folder, texts, router_init="ridge", **values), tmp_path / "btx")
    model = load_float32(tmp_path / "btx")
    assert [loss.domain for loss in report.losses] == list(DOMAINS)
    for loss in report.losses:
        text = texts[loss.domain]
        own = {"active_experts": [loss.domain]}
        if "expert_mode" in values:  # a source's chunks add up; gate weights that are softmaxed would halve them
            own = None
        # whole models, document by document, here; in windows and layer by layer there, in float32
        assert loss.routed == pytest.approx(slow_bits(model, text), rel=1e-4)
        assert loss.source == pytest.approx(slow_bits(load_float32(folder / loss.domain), text), rel=1e-4)
        if own:
            assert loss.own_expert == pytest.approx(slow_bits(model, text, **own), rel=1e-4)
        assert loss.lost_by_sharing + loss.lost_by_routing == pytest.approx(loss.routed - loss.source)


def test_a_fit_of_a_model_that_exists_knows_no_source(grown, tmp_path):
    folder, texts = grown
    merge(recipe_of(folder), tmp_path / "btx")
    report = fit(FitRecipe(str(tmp_path / "btx"), domain_text=texts), tmp_path / "fitted")
    for loss in report.losses:
        assert loss.source is None
        assert loss.routed == pytest.approx(slow_bits(load_float32(tmp_path / "fitted"), texts[loss.domain]), rel=1e-4)
    recorded = yaml.safe_load((tmp_path / "fitted/btx_recipe.yaml").read_text())["fits"][0]
    assert recorded["losses"] == report.to_dict()["losses"] == [vars(loss) for loss in report.losses]
    assert "| code |  | " in (tmp_path / "fitted/README.md").read_text()


def test_kept_statistics_keep_the_losses_of_the_same_penalties_alone(grown, tmp_path):
    folder, texts = grown
    recipe = recipe_of(folder, texts, router_init="ridge")
    kept = Options(statistics=tmp_path / "statistics")
    first = merge(recipe, tmp_path / "first", kept).losses
    assert first
    assert merge(recipe, tmp_path / "again", kept).losses == first
    assert not merge(replace(recipe, router_ridge=0.1), tmp_path / "other", kept).losses


def test_a_layers_own_error_is_that_of_a_perfect_router(grown, tmp_path):
    """Where the experts' own outputs are the targets there is none; against the sources' states there is."""
    folder, texts = grown
    plain = merge(recipe_of(folder, texts, router_init="ridge"), tmp_path / "plain")
    assert all(layer.own_error == pytest.approx(0, abs=1e-6) for layer in plain.layers)
    shared = merge(recipe_of(folder, texts, router_init="ridge", combine="regmean_merged"), tmp_path / "shared")
    assert all(layer.own_error > 0.01 for layer in shared.layers)


def test_the_commands_say_what_is_lost(grown, tmp_path):
    folder, texts = grown
    given = [word for name, text in texts.items() for word in ("--domain-text", f"{name}={text.references[0]}")]
    sources = [word for name in DOMAINS for word in ("--expert", f"{name}={folder / name}")]
    command = [
        "merge",
        "--seed",
        str(folder / "seed"),
        *sources,
        "--allow-unrelated",
        "--router-init",
        "ridge",
        *given,
    ]
    merged = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "btx")], env={"COLUMNS": "300"})
    assert "bits per byte are gained by the weights that experts share; " in merged.output
    command = ["fit", str(tmp_path / "btx"), *given, "-o", str(tmp_path / "out")]
    fitted = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
    assert "bits per byte are lost by the routers" in fitted.output
    printed = CliRunner().invoke(app, [*command, "--json", "--overwrite"])
    assert [loss["domain"] for loss in json.loads(printed.output)["losses"]] == list(DOMAINS)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (
            DomainLoss("code", 2.3, 2.35, 2.0),
            "0.300 bits per byte are lost by the weights that experts share; 0.050 bits per byte are lost by",
        ),
        (DomainLoss("code", 2.3, 2.35, 2.0), "(`btx branch --train ff`)"),
        (DomainLoss("code", 2.0, 2.2, 1.9), "or train them (`btx train`)"),
        (DomainLoss("code", 2.01, 2.02, 2.0), "next to nothing"),
        (DomainLoss("code", 2.3, 2.2, 2.0), "experts share; 0.100 bits per byte are gained by the routers"),
        (DomainLoss("code", 2.0, 1.9999), "0.000 bits per byte are lost by the routers: next to nothing"),
        (DomainLoss("code", 2.0, 2.2), "0.200 bits per byte are lost by the routers. Fit them on more text"),
    ],
)
def test_the_verb_that_helps_is_named(loss, said):
    assert said in fit_advice([loss])


def test_text_of_which_nothing_can_be_held_out_is_told(grown, tmp_path):
    folder, texts = grown
    warnings: list[str] = []
    told = Told(warn=warnings.append)
    merge(recipe_of(folder, texts, router_init="ridge", domain_tokens=128), tmp_path / "short", reporter=told)
    found = [line for line in warnings if "held out" in line]
    assert [line.split("to be held out")[0] for line in found] == [
        "domain_text: code, math: too little for a window of 128 tokens "
    ]
    warnings.clear()
    merge(recipe_of(folder, texts, router_init="ridge", domain_tokens=256), tmp_path / "enough", reporter=told)
    assert not [line for line in warnings if "held out" in line]
