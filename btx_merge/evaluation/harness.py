"""The texts of an evaluation as tasks of lm-evaluation-harness, which measures the same figures by its own code."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from btx_merge.files.placing import put_in_place
from btx_merge.files.scratch import scratch_folder
from btx_merge.reporting import Reporter

if TYPE_CHECKING:
    from btx_merge.measuring.windows import Domain

METRICS = ("bits_per_byte", "byte_perplexity", "word_perplexity")


def write_tasks(domains: Sequence[Domain], target: Path, overwrite: bool, reporter: Reporter) -> None:
    """Write a task for each domain into a folder, `btx_NAME.yaml`, and its documents beside it.

    The harness looks for local data from where it is started, so the tasks name theirs by the full path.

    Raises:
        InputError: a text that cannot be read, or something has come into the folder's place meanwhile.
        OSError: the disk refused.
    """
    with scratch_folder(target.parent) as folder:
        made = folder / "tasks"
        made.mkdir()
        for domain in domains:
            name = domain.text.name
            with (made / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
                for document in domain.documents():
                    stream.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            values = _task(name, target / f"{name}.jsonl")
            (made / f"btx_{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        put_in_place(made, target, overwrite, reporter.note, "the same command")


def _task(name: str, data: Path) -> dict[str, object]:
    return {
        "task": f"btx_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "text",  # the field itself: a template would be rendered
        "metric_list": [{"metric": metric} for metric in METRICS],
        "metadata": {"version": 1.0},
    }


def command(model: str, domains: Sequence[str], target: Path, window: int, dtype: str) -> str:
    """Return the command by which the harness measures a model on the tasks as `btx eval` does.

    Without `add_bos_token=False` the harness lets the tokenizer put a bos before each document, behind the one that
    the first token follows anyway, and scores it; without `max_length` its windows are as long as the model allows.
    """
    given = f"pretrained={model},trust_remote_code=True,dtype={dtype},add_bos_token=False,max_length={window}"
    tasks = ",".join(f"btx_{name}" for name in domains)
    words = ["lm_eval", "--model", "hf", "--model_args", given, "--tasks", tasks, "--include_path", str(target)]
    return shlex.join(words)
