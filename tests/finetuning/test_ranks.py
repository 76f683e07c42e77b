"""`btx train` on two processes: by torchrun with gloo, as one process with the same global batch computes it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from btx_merge import MergeRecipe, merge
from btx_merge.cli.app import app
from btx_merge.finetuning.run import train
from tests.finetuning.test_run import recipe
from tests.support import warm
from tests.support.common import Told, assert_complete, grow, raw_bytes, save_seed, tensors_of

FLAGS = [
    *("--max-steps=6", "--logging-steps=1", "--max-length=32", "--learning-rate=1e-2", "--report-to=none"),
    "--save-steps=2",
]


def torchrun(level: str | None = "package") -> list[str]:
    return warm.torchrun(level, "-m", "btx_merge", "train")


def run(command: list[str], merged: Path, texts: dict[str, str], *flags: Any) -> dict[str, Any]:
    data = [f"--data=code={texts['code']}", f"--data=math={texts['math']}:3"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    words = [*command, merged, *data, *FLAGS, *flags, "--json"]
    done = warm.run(words, env=environment, timeout=300, level="torch")
    assert done.returncode == 0, done.stderr[-5000:]
    report: dict[str, Any] = json.loads(done.stdout)  # of one rank alone
    return {**report, "lines": steps_of(done.stderr.splitlines())}


def steps_of(lines: list[str]) -> list[list[str]]:
    """Of the console's lines: loss and balancing loss of each step, to four digits."""
    return [line.split()[1:3] for line in lines if re.match(r" +\d+/6 ", line)]


def on_one_rank(merged: Path, texts: dict[str, str], out: Path, **changes: Any) -> tuple[dict[str, Any], Path]:
    """Four rows at once on one process."""
    lines: list[str] = []
    settings = {"per_device_train_batch_size": 4, "save_steps": 2}
    report = train(recipe(merged, texts, arguments=settings, **changes), out, reporter=Told(line=lines.append))
    return {**report.entry, "lines": steps_of(lines)}, out


@pytest.fixture(scope="module")
def alone(merged, texts, tmp_path_factory):
    return on_one_rank(merged, texts, tmp_path_factory.mktemp("alone") / "out")


def assert_the_same(ours: dict[str, Any], out: Path, alone: Any, merged: Path) -> None:
    """Losses within 1e-5, relative; weights after six steps of about 1e-2 within 1e-3; frozen ones to the byte."""
    expected, folder = alone
    assert len(ours["lines"]) == 6
    assert ours["lines"] == expected["lines"]
    for when in ("first", "last"):
        assert ours["losses"][when] == pytest.approx(expected["losses"][when], rel=1e-5)
    for when, scores in expected["held_out_perplexity"].items():
        assert ours["held_out_perplexity"][when] == pytest.approx(scores, rel=1e-4)
    assert_complete(out)
    theirs, before = tensors_of(folder), tensors_of(merged)
    for name, tensor in tensors_of(out).items():
        assert (tensor - theirs[name]).abs().max() <= 1e-3, name
        if ".experts." in name:
            assert raw_bytes(tensor) == raw_bytes(before[name])


@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_as_one(merged, texts, tmp_path, alone, sharded):
    """Each with a copy, then each with a part of the parameters (FSDP2): sharding is asserted by the run itself."""
    flags = ["-o", tmp_path / "out", "--per-device-train-batch-size=2", *(["--fsdp-size=2"] if sharded else [])]
    ours = run(torchrun(), merged, texts, *flags)
    assert ours["world_size"] == 2
    assert_the_same(ours, tmp_path / "out", alone, merged)


@pytest.mark.slow
def test_an_error_of_all_ranks_is_said_once(merged, texts, tmp_path):
    """The second rank waits for the first to say it, and torchrun ends it."""
    command = [*torchrun(None), str(merged), f"--data=code={texts['code']}", f"--data=math={tmp_path / 'none.txt'}"]
    done = subprocess.run([*command, *FLAGS, "-o", str(tmp_path / "out")], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "none.txt: no such file" in line
    assert list(tmp_path.iterdir()) == []


def test_a_rank_whose_error_is_its_own_says_it(tmp_path, monkeypatch, capsys):
    """Nobody ends it, so after a while it speaks."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    done = CliRunner().invoke(app, ["train", str(tmp_path), "--data=code=none.txt", "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "code: none.txt: no such file" in done.stderr
    assert waited == [10]


@pytest.fixture(scope="module")
def tied(texts, tmp_path_factory) -> Path:
    """A merged model whose head is its embedding, as Llama 3.2 1B's and SmolLM2's is."""
    root = tmp_path_factory.mktemp("tied")
    seed = save_seed(root / "seed", tie_word_embeddings=True)
    expert = grow(seed, root / "expert")
    merge(MergeRecipe(str(seed), {"code": str(expert)}), root / "merged")
    return root / "merged"


@pytest.mark.parametrize("mode", ["shared", "all"])
def test_a_tied_model_in_shards_as_on_one_rank(tied, texts, tmp_path, mode):
    """Head and embedding stay one tensor, trained once and written once. Weights of about 1e-2 within 1e-3."""
    expected, folder = on_one_rank(tied, texts, tmp_path / "alone", train=mode)
    flags = [*("--train", mode), *("-o", tmp_path / "out"), "--per-device-train-batch-size=2", "--fsdp-size=2"]
    ours = run(torchrun(), tied, texts, *flags)
    assert ours["lines"] == expected["lines"]
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    theirs = tensors_of(folder)
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert (tensor - theirs[name]).abs().max() <= 1e-3, name
    assert_complete(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["merged", "tied"])
@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_go_on(request, texts, tmp_path, model, sharded):
    """Rank 1 is killed in step 5; both go on from the checkpoint of step 4."""
    merged = request.getfixturevalue(model)
    alone = on_one_rank(merged, texts, tmp_path / "alone")
    flags = ["-o", tmp_path / "out", "--per-device-train-batch-size=2", *(["--fsdp-size=2"] if sharded else [])]
    killer = tmp_path / "killer"
    killer.mkdir()
    (killer / "sitecustomize.py").write_text(KILLER)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(killer)}
    data = [f"--data=code={texts['code']}", f"--data=math={texts['math']}:3"]
    command = [*torchrun(None), str(merged), *data, *FLAGS, *map(str, flags)]
    died = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert died.returncode != 0
    complete = [path.parent.name for path in tmp_path.glob("out.btx-training/*/complete")]
    assert sorted(complete) == ["checkpoint-2", "checkpoint-4"], died.stderr[-3000:]
    ours = run(torchrun(), merged, texts, *flags, "--resume")
    assert len(ours["lines"]) == 2
    ours["lines"] = [*alone[0]["lines"][:4], *ours["lines"]]
    assert_the_same(ours, tmp_path / "out", alone, merged)


KILLER = """
import os, signal, sys
if os.environ.get("RANK") == "1":
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "btx_merge.finetuning.session":
                sys.meta_path.remove(self)
                from btx_merge.finetuning import trainer
                plain = trainer.BTXTrainer.compute_loss
                def deadly(self, *arguments, **options):
                    if self.model.training and self.state.global_step == 4:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return plain(self, *arguments, **options)
                trainer.BTXTrainer.compute_loss = deadly
    sys.meta_path.insert(0, Finder())
"""
