"""The same texts in lm-evaluation-harness: the tasks that are written, and the figures that it finds."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from btx_merge import EvalRecipe, InputError, evaluate, export
from btx_merge.evaluation.harness import command
from tests.exporting.test_engines import TEXT, a_merge, tokenizer  # noqa: F401
from tests.support.common import Told

PYTHON = Path(__file__).parents[2] / ".engines" / "lm-eval" / "bin" / "python"


def test_tasks_hold_the_text_that_is_measured(measured, texts, tmp_path):
    notes: list[str] = []
    recipe = EvalRecipe(str(measured), texts, no_sources=True, tokens=100, window=16)
    report = evaluate(recipe, lm_eval_tasks=tmp_path / "tasks", reporter=Told(note=notes.append))
    folder = tmp_path / "tasks"
    assert sorted(file.name for file in folder.iterdir()) == [
        "btx_code.yaml",
        "btx_math.yaml",
        "code.jsonl",
        "math.jsonl",
    ]
    for name, amount in report.domains.items():
        lines = [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
        assert len(lines) == amount.documents
        assert sum(len(line.encode()) for line in lines) == amount.nbytes
        task = yaml.safe_load((folder / f"btx_{name}.yaml").read_text())
        assert task["dataset_kwargs"]["data_files"] == {"test": str(folder / f"{name}.jsonl")}
        assert task["output_type"] == "loglikelihood_rolling"
    (note,) = notes
    assert f"--tasks btx_code,btx_math --include_path {folder}" in note
    assert "add_bos_token=False,max_length=16" in note
    with pytest.raises(InputError, match="not empty"):
        evaluate(recipe, lm_eval_tasks=folder)


@pytest.mark.slow
def test_the_harness_finds_the_same_figures(tmp_path, tokenizer):  # noqa: F811
    """1 % was asked for, 1e-8 was seen: windows meet others in a batch, and are summed in another order.

    The text is cut by `tokens`, and the windows are shorter than its documents, so that context is carried over.
    """
    merged = a_merge(tmp_path, tokenizer)
    export(str(merged), tmp_path / "mixtral")
    (tmp_path / "code.jsonl").write_text("\n".join(json.dumps({"text": TEXT[at : at + 900]}) for at in (0, 900, 5000)))
    (tmp_path / "long.txt").write_text("\n" + TEXT[9000:13000] + "  \n\n")
    data = {"code": str(tmp_path / "code.jsonl"), "long": str(tmp_path / "long.txt")}
    recipe = EvalRecipe(str(merged), data, no_sources=True, tokens=1500, window=100)
    report = evaluate(recipe, lm_eval_tasks=tmp_path / "tasks")
    assert all(amount.windows > amount.documents for amount in report.domains.values())
    scores = report.rows[0].scores
    for model in (merged, tmp_path / "mixtral"):
        found = by_harness(command(str(model), list(data), tmp_path / "tasks", 100, "float32"), tmp_path / model.name)
        for name, score in scores.items():
            assert found[f"btx_{name}"]["bits_per_byte,none"] == pytest.approx(score.bits_per_byte, rel=1e-5)


def by_harness(line: str, output: Path) -> dict[str, dict[str, float]]:
    """Run the command that a user is shown."""
    if not PYTHON.exists():
        pytest.fail("lm-eval is not there. `make .engines/lm-eval/installed` builds it, `make slow` all of them.")
    words = [str(PYTHON), "-m", "lm_eval", *line.split()[1:], "--device", "cpu", "--output_path", str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output / "cache")}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=output.parent)
    assert done.returncode == 0, done.stderr[-5000:]
    (file,) = output.rglob("results_*.json")
    return dict(json.loads(file.read_text())["results"])
