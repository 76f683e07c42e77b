"""`btx push` and `model.push_to_hub`: the real clients against a small Hub that can be written to."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from btx_merge import MergeRecipe, merge
from btx_merge.model.files import MODEL_CODE
from tests.conftest import Family
from tests.support import warm
from tests.support.common import WITHOUT_BTX_MERGE, edit_json, files_of, load_float32, logits_of, save_seed
from tests.support.hub_server import READER, STRANGER, WRITER, Hub
from tests.support.warm import BTX

Done = subprocess.CompletedProcess[str]


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A server of the test's own: a stalled request of another would reach a common log a minute later."""
    server = Hub(tmp_path_factory.mktemp("hub"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def model(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge in several files, with a card that has everything."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(merged, folder)
    card = (folder / "README.md").read_text()
    more = "base_model: [org/seed, org/code]\nbase_model_relation: merge\nlicense: mit\nlanguage: en\n"
    (folder / "README.md").write_text(card.replace("---\n", f"---\n{more}", 1))
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def btx(hub: Hub, home: Path, *arguments: Any, token: str = WRITER, loaded: bool = False, **environment: str) -> Done:
    """Runs btx; unless asked for, a push does not load the model first."""
    environment |= {"HF_TOKEN": token} if token else {}
    environment |= {} if loaded else {"TEST_PUSH_UNLOADED": "1"}
    level = "torch" if arguments[0] == "fit" else "command"
    done = warm.run([BTX, *arguments], env=hub.environment(home, **environment), cwd=home.parent, level=level)
    assert "Traceback" not in done.stderr + done.stdout
    assert not token or token not in done.stderr + done.stdout
    return done


def pushed(hub: Hub, home: Path, *arguments: Any, **more: str) -> dict[str, Any]:
    done = btx(hub, home, "push", *arguments, "--json", **more)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def error_of(done: Done, code: int = 2) -> str:
    """The one line; huggingface_hub tells of its tries in lines of its own."""
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def put(hub: Hub) -> list[str]:
    """The objects that were uploaded completely."""
    return [line.split()[1].removeprefix("/lfs/") for line in hub.requests() if re.match(r"PUT \S+ 200", line)]


def hashes(model: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(model.glob("*.safetensors"))]


def written(hub: Hub) -> list[str]:
    """Requests that would change something."""
    return hub.requests(lambda line: re.match(r"PUT|POST /api/(repos|models)", line) is not None)


def repository(hub: Hub, repo_id: str = "org/m", ref: str = "main") -> dict[str, bytes]:
    return {name: content for name, content in files_of(hub.folder(repo_id, ref)).items() if name != ".gitattributes"}


def as_sent(model: Path, repo_id: str = "org/m") -> dict[str, bytes]:
    """A folder's files as they are published: the code in the card names the repository."""
    files = files_of(model)
    before = files["README.md"].decode()
    assert before.count('\npath = "."  #') == 1
    return {**files, "README.md": before.replace('\npath = "."  #', f'\npath = "{repo_id}"  #').encode()}


# Round trips

LOAD = (
    WITHOUT_BTX_MERGE
    + """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model((torch.arange(60).reshape(2, 30) * 37) % 128).logits
assert "btx_merge" not in sys.modules
assert AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)("w1 w2").input_ids == [1, 2]
torch.save(logits, sys.argv[2])
"""
)


def loaded_elsewhere(hub: Hub, repo_id: str, room: Path) -> torch.Tensor:
    """Logits of a model from the Hub, in a process and a cache that know nothing of this package."""
    environment = hub.environment(room / "elsewhere")
    command = [sys.executable, "-c", LOAD, repo_id, str(room / "logits")]
    done = warm.run(command, env=environment, cwd=room, level="torch")
    assert done.returncode == 0, done.stderr
    return torch.load(room / "logits")


def test_a_round_trip(hub: Hub, model: Path, home: Path, tmp_path: Path) -> None:
    done = btx(hub, home, "push", model, "org/m", loaded=True)
    assert (done.returncode, done.stderr) == (0, "")
    commit = hub.repo("org/m")["refs"]["main"]
    lines = done.stdout.splitlines()
    assert lines[0] == f"published {hub.url}/org/m (commit {commit[:8]})"
    assert lines[1].startswith(f"files     {len(files_of(model))} new or changed, ")
    assert repository(hub) == as_sent(model)
    assert sorted(put(hub)) == sorted(hashes(model))
    assert len(hashes(model)) > 2
    commits = hub.requests(lambda line: line.startswith("POST /api/models/org/m/commit"))
    assert len(commits) == 1
    assert loaded_elsewhere(hub, "org/m", tmp_path).equal(logits_of(load_float32(model)))


def test_as_json_and_again(hub: Hub, model: Path, home: Path) -> None:
    report = pushed(hub, home, model, "org/m", "--commit-message", "First words")
    commit = hub.repo("org/m")["refs"]["main"]
    assert report["seconds"] > 0
    assert {key: report[key] for key in report if key != "seconds"} == {
        "repo_id": "org/m",
        "url": f"{hub.url}/org/m",
        "commit": commit,
        "pull_request": None,
        "files": [*sorted(file.name for file in model.glob("*.safetensors")), *report["files"][-11:]],
        "deleted": [],
        "nbytes": sum(len(content) for content in as_sent(model).values()),
        "warnings": [],
        "adapted": ["README.md"],
    }
    assert sorted(report["files"]) == sorted(files_of(model))
    assert hub.repo("org/m")["messages"][commit] == "First words"
    before = len(hub.requests())
    done = btx(hub, home, "push", model, "org/m")
    assert done.stdout == f"unchanged {hub.url}/org/m holds this very model; nothing was committed\n"
    assert not [line for line in hub.requests()[before:] if line in written(hub)]
    assert btx(hub, home, "push", model, "org/m", "--quiet").stdout == ""


def test_a_smaller_model_over_a_larger_one(hub: Hub, model: Path, family: Family, home: Path, tmp_path: Path) -> None:
    """Shards, index and templates of the old one go; what is no part of a model stays."""
    pushed(hub, home, model, "org/m")
    for name in ("chat_template.jinja", "logo.png"):
        (hub.folder("org/m") / name).write_text("x")
    small = tmp_path / "small"
    merge(MergeRecipe(str(family.seed), {"code": str(family.code)}), small)
    report = pushed(hub, home, small, "org/m")
    gone = {"chat_template.jinja", "model.safetensors.index.json", *(file.name for file in model.glob("model-*"))}
    assert set(report["deleted"]) == gone
    assert set(report["files"]) == {"model.safetensors", "config.json", "README.md", "btx_recipe.yaml"}
    assert repository(hub) == {**as_sent(small), "logo.png": b"x"}
    assert "deleted   " in btx(hub, home, "push", model, "org/m").stdout
    assert repository(hub) == {**as_sent(model), "logo.png": b"x"}


PUSH_TO_HUB = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import btx_merge
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("org/m", max_shard_size="300KB")
AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub("org/m")
"""


def test_push_to_hub(hub: Hub, model: Path, home: Path, tmp_path: Path) -> None:
    """transformers' own way carries the code, and names the kind of model in the card that it writes."""
    command = [sys.executable, "-c", PUSH_TO_HUB, str(model)]
    environment = hub.environment(home, HF_TOKEN=WRITER)
    done = warm.run(command, env=environment, cwd=tmp_path, level="torch")
    assert done.returncode == 0, done.stderr
    files = repository(hub)
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", *MODEL_CODE} <= files.keys()
    metadata = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert metadata["tags"] == ["btx", "branch-train-mix", "mixture-of-experts", "merge"]
    assert metadata["library_name"] == "transformers"
    (tmp_path / "there").mkdir()
    for name, content in files.items():
        (tmp_path / "there" / name).write_bytes(content)
    command = [sys.executable, "-c", LOAD, tmp_path / "there", tmp_path / "logits"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = warm.run(command, env=environment, cwd=tmp_path, level="transformers")
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "logits").equal(logits_of(load_float32(model)))


# Branches, pull requests, private repositories


def test_a_branch(hub: Hub, model: Path, home: Path) -> None:
    report = pushed(hub, home, model, "org/m", "--revision", "v2")
    assert report["url"] == f"{hub.url}/org/m/tree/v2"
    assert repository(hub, ref="v2") == as_sent(model)
    assert repository(hub) == {}
    assert pushed(hub, home, model, "org/m", "--revision", "v2")["files"] == []


def test_a_pull_request(hub: Hub, model: Path, home: Path) -> None:
    """On a repository of others, of which nothing changes."""
    hub.add("other/m", model)
    changed = home.parent / "changed"
    shutil.copytree(model, changed)
    edit_json(changed / "config.json", num_experts_per_tok=1)
    report = pushed(hub, home, changed, "other/m", "--create-pr")
    assert report["url"] == report["pull_request"] == f"{hub.url}/other/m/discussions/1"
    assert report["files"] == ["README.md", "config.json"]
    assert repository(hub, "other/m") == files_of(model)
    assert repository(hub, "other/m", "refs/pr/1") == as_sent(changed, "other/m")
    line = error_of(btx(hub, home, "push", changed, "other/m", "--create-pr", "--revision", "v9"))
    assert line.startswith("push: other/m: there is no branch v9; expected one, for a pull request")
    line = error_of(btx(hub, home, "push", changed, "other/none", "--create-pr"))
    assert line.startswith("push: other/none: there is no such repository to open a pull request on")


def test_a_private_repository(hub: Hub, model: Path, home: Path, tmp_path: Path) -> None:
    pushed(hub, home, model, "org/m", "--private")
    assert hub.repo("org/m")["private"] is True
    assert pushed(hub, home, model, "org/m")["files"] == []  # stays private
    code = "import sys, huggingface_hub\nprint(huggingface_hub.snapshot_download('org/m', local_dir=sys.argv[1]))"
    command = [sys.executable, "-c", code, tmp_path / "copy"]
    done = warm.run(command, env=hub.environment(home, HF_TOKEN=READER), level="python")
    assert done.returncode == 0, done.stderr
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in files_of(model)} == as_sent(model)
    for token in ("", STRANGER):
        lines = btx(hub, home, "fit", "org/m", "-o", tmp_path / "out", "--method", "prompts", token=token).stderr
        assert lines.startswith("error: model: org/m: no such folder here and no such repository on the Hub; expected")


def test_what_is_public_does_not_become_private(hub: Hub, model: Path, home: Path) -> None:
    pushed(hub, home, model, "org/m")
    before = written(hub)
    line = error_of(btx(hub, home, "push", model, "org/m", "--private"))
    assert line == (
        "push: org/m: the repository is public; expected a private one, as --private says. "
        "Leave out --private, give another name, or make it private in its settings first."
    )
    assert written(hub) == before


def test_a_repository_that_holds_something_else(hub: Hub, model: Path, family: Family, home: Path) -> None:
    before = hub.add("org/llama", family.code)
    line = error_of(btx(hub, home, "push", model, "org/llama"))
    assert line == (
        "push: org/llama: the repository holds a model of type 'llama'; expected none, or an empty one, or one with "
        "a merged model. Give another name, or --create-pr to propose it there."
    )
    (hub.folder("org/llama") / "config.json").write_text("[]")
    assert "holds something else; expected" in error_of(btx(hub, home, "push", model, "org/llama"))
    assert hub.repo("org/llama")["refs"] == {"main": before}
    assert not written(hub)
    assert pushed(hub, home, model, "org/llama", "--create-pr")["pull_request"]


def test_a_repository_made_on_the_web(hub: Hub, model: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for name in (".gitattributes", "README.md"):
        (tmp_path / "new" / name).write_text("---\nlicense: mit\n---\n")
    hub.add("org/m", tmp_path / "new", private=True)
    pushed(hub, home, model, "org/m", "--private")
    assert repository(hub) == as_sent(model)


# What goes wrong on the way


def test_an_interrupted_upload_continues(hub: Hub, model: Path, home: Path) -> None:
    """The line is cut in the second shard, at each try. The next run sends the rest, and then there is a commit."""
    hub.fail("PUT /lfs/", "cut", skip=1)
    line = error_of(btx(hub, home, "push", model, "org/m"), 1)
    assert line.startswith(f"org/m: the Hub at {hub.url} cannot be reached (")
    assert line.endswith("Check the network. What is uploaded is kept: the same command continues.")
    first, *others = hashes(model)
    assert put(hub) == [first]
    assert repository(hub) == {}
    hub.heal()
    pushed(hub, home, model, "org/m")
    assert put(hub) == [first, *others]
    assert repository(hub) == as_sent(model)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_in_the_middle_of_an_upload(hub: Hub, model: Path, home: Path, how: signal.Signals) -> None:
    hub.fail("PUT /lfs/", "stall", skip=1)
    command = [str(BTX), "push", str(model), "org/m"]
    environment = hub.environment(home, HF_TOKEN=WRITER, TEST_PUSH_UNLOADED="1")
    with warm.started(command, env=environment) as (process, stream):
        limit = time.monotonic() + 60
        while not hub.requests(lambda line: line.endswith("stalled")):
            assert time.monotonic() < limit
            os.kill(process.pid, 0)  # it is there
            time.sleep(0.05)
        os.kill(process.pid, how)
        code, stderr = process.wait(60), stream.read()
    if how is signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 130
        assert stderr == "error: Interrupted. What is uploaded is kept: the same command continues.\n"
    assert repository(hub) == {}
    hub.heal()
    pushed(hub, home, model, "org/m")
    assert put(hub) == hashes(model)
    assert repository(hub) == as_sent(model)


@pytest.mark.parametrize(
    "request_", ["PUT /lfs/", "/preupload/", "objects/batch", "POST .*/commit/", "GET /api/models/", "repos/create"]
)
def test_500_twice_is_waited_for(hub: Hub, model: Path, home: Path, request_: str) -> None:
    hub.fail(request_, "500", times=2)
    pushed(hub, home, model, "org/m")
    assert len([line for line in hub.requests() if line.endswith(" 500")]) == 2
    assert repository(hub) == as_sent(model)


@pytest.mark.parametrize("request_", ["PUT /lfs/", "POST .*/commit/", "GET /api/models/", "validate-yaml"])
def test_500_for_ever_is_one_line(hub: Hub, model: Path, home: Path, request_: str) -> None:
    hub.fail(request_, "500")
    assert error_of(btx(hub, home, "push", model, "org/m"), 1) == (
        f"org/m: the Hub at {hub.url} failed (500: This went wrong on purpose). "
        "What is uploaded is kept: the same command continues."
    )
    assert not (hub.root / "org/m").exists() or repository(hub) == {}


def test_a_commit_of_which_the_answer_is_lost(hub: Hub, model: Path, home: Path) -> None:
    hub.fail("POST .*/commit/", "lost", times=1)
    report = pushed(hub, home, model, "org/m")
    assert report["commit"] == hub.repo("org/m")["refs"]["main"]
    assert len(report["files"]) == len(files_of(model))
    assert len(hub.repo("org/m")["messages"]) == 1
    assert repository(hub) == as_sent(model)


def test_somebody_else_commits_meanwhile(hub: Hub, model: Path, home: Path) -> None:
    """What they changed was not looked at, so nothing is committed on top."""
    pushed(hub, home, model, "org/m")
    changed = home.parent / "changed"
    shutil.copytree(model, changed)
    edit_json(changed / "config.json", num_experts_per_tok=1)
    hub.fail("POST .*/commit/", "412")
    line = error_of(btx(hub, home, "push", changed, "org/m"), 1)
    assert line.startswith("org/m: it was changed by somebody else meanwhile (")
    assert repository(hub) == as_sent(model)


# What the user can mend


@pytest.mark.parametrize(
    ("token", "repo_id", "said"),
    [
        ("", "org/m", "push: token: there is none; expected one that may write to org/m. Run `hf auth login`, or set"),
        ("hf_wrong", "org/m", "push: token: the Hub does not know this token; expected one that may write to org/m."),
        (READER, "org/m", "push: org/m: this token may not write there (403: You don't have the rights"),
        (STRANGER, "org/m", "push: org/m: this token may not write there (403: You don't have the rights"),
        (WRITER, "nobody/m", "push: nobody/m: this token may not write there (403: You don't have the rights"),
        (WRITER, "m", "push: m: no name that a repository can have (it has no owner); expected org/name."),
        (WRITER, "org/m@v1", "push: org/m@v1: no name that a repository can have (Repo id must use"),
    ],
)
def test_tokens_and_names(hub: Hub, model: Path, home: Path, token: str, repo_id: str, said: str) -> None:
    line = error_of(btx(hub, home, "push", model, repo_id, token=token))
    assert line.startswith(said)
    assert not put(hub)


def test_no_right_to_write_to_what_is_there(hub: Hub, model: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/README.md").write_text("")
    hub.add("org/m", tmp_path / "new")
    line = error_of(btx(hub, home, "push", model, "org/m", token=READER))
    assert line.startswith("push: org/m: this token may not write there (403: You have no write access")
    assert line.endswith("Is org you or an organisation of yours, and does the token have write access?")
    assert not put(hub)


def test_a_repository_that_the_token_cannot_see(hub: Hub, model: Path, home: Path) -> None:
    hub.add("org/m", model, hidden=True)
    line = error_of(btx(hub, home, "push", model, "org/m"))
    assert line == (
        "push: org/m: it exists, but this token cannot see it. Give another name, or a token that may read it."
    )
    assert not put(hub)


def test_no_network(hub: Hub, model: Path, home: Path) -> None:
    line = error_of(btx(hub, home, "push", model, "org/m", HF_ENDPOINT="http://127.0.0.1:9"), 1)
    assert line.startswith("org/m: the Hub at http://127.0.0.1:9 cannot be reached (")
    line = error_of(btx(hub, home, "push", model, "org/m", HF_HUB_OFFLINE="1"))
    assert line == "push: HF_HUB_OFFLINE: set; expected a way to the Hub. Unset it."


def test_a_branch_that_is_none(hub: Hub, model: Path, home: Path) -> None:
    line = error_of(btx(hub, home, "push", model, "org/m", "--revision", "a" * 40))
    assert line.endswith("a commit; expected a branch, such as main")
    line = error_of(btx(hub, home, "push", model, "org/m", "--revision", "a b"))
    assert line == "push: org/m: the Hub refuses (400: Invalid reference name: a b)"


def test_a_card_that_the_hub_does_not_accept(hub: Hub, model: Path, home: Path) -> None:
    """Its list of licences is longer than any that we could keep."""
    folder = home.parent / "model"
    shutil.copytree(model, folder)
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("license: mit", "license: mine-1.0"))
    line = error_of(btx(hub, home, "push", folder, "org/m"))
    assert line.startswith('model: README.md: the Hub does not accept it ("license" must be one of')
    assert not written(hub)


def test_every_problem_in_one_report_and_nothing_is_sent(hub: Hub, model: Path, home: Path) -> None:
    folder = home.parent / "model"
    shutil.copytree(model, folder)
    (folder / "optimizer.pt").write_text("x")
    with (folder / "README.md").open("a") as card:
        card.write(f"\n{WRITER} in {folder}\n")
    done = btx(hub, home, "push", folder, "m", "--json")
    assert done.returncode == 2
    problems = json.loads(done.stdout)["problems"]
    assert [problem.split(": ")[1] for problem in problems] == [
        "m",
        "optimizer.pt",
        *2 * [f"README.md, line {len((folder / 'README.md').read_text().splitlines())}"],
    ]
    assert [f"error: {problem}" for problem in problems] == done.stderr.splitlines()
    assert not hub.requests()


def test_warnings_come_before_anything_is_sent(hub: Hub, merged: Path, home: Path) -> None:
    done = btx(hub, home, "push", merged, "org/m", "-q", token="hf_wrong")
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == 3 * ["warning"] + ["error"]


# And from there


def test_a_pushed_model_is_fitted_and_keeps_its_recipe(
    hub: Hub, model: Path, home: Path, tmp_path: Path, texts: dict[str, str]
) -> None:
    commit = pushed(hub, home, model, "org/m", "--private")["commit"]
    given = [f"--domain-text={name}={text}" for name, text in texts.items()]
    arguments = ("fit", f"org/m@{commit}", "-o", tmp_path / "out", "--domain-tokens", "200", *given, "-q")
    done = btx(hub, home, *arguments, token=READER)
    assert done.returncode == 0, done.stderr
    before = yaml.safe_load((model / "btx_recipe.yaml").read_text())
    after = yaml.safe_load((tmp_path / "out/btx_recipe.yaml").read_text())
    assert after.pop("fits")[0]["method"] == "logistic"
    assert after == before
    assert not [line for line in hub.requests() if line.startswith("GET") and ".py" in line]
    report = pushed(hub, home, tmp_path / "out", "org/fitted")
    assert set(report["files"]) == set(files_of(model))


def test_a_merge_from_private_and_gated_sources(hub: Hub, family: Family, home: Path, tmp_path: Path) -> None:
    seed, code = hub.add("org/seed", family.seed, private=True), hub.add("org/code", family.code, "v1", gated="auto")
    arguments = ("merge", "--seed", "org/seed", "--expert", "code=org/code@v1", "-o", tmp_path / "out", "-q")
    done = btx(hub, home, *arguments, token=STRANGER)
    assert [line.split("; ")[0] for line in done.stderr.splitlines()] == [
        "error: seed: org/seed: no such folder here and no such repository on the Hub",
        "error: code: org/code@v1: the repository is gated and this token has no access",
    ]
    done = btx(hub, home, *arguments, token="hf_wrong")
    assert [line.split("; ")[0] for line in done.stderr.splitlines()] == [
        f"error: {source}: the Hub does not know this token" for source in ("seed: org/seed", "code: org/code@v1")
    ]
    done = btx(hub, home, *arguments, token=READER)
    assert (done.returncode, done.stderr) == (0, "")
    recipe = yaml.safe_load((tmp_path / "out/btx_recipe.yaml").read_text())
    assert recipe["seed"] == f"org/seed@{seed}"
    assert recipe["experts"]["code"]["model"] == f"org/code@{code}"
    report = pushed(hub, home, tmp_path / "out", "me/merged")
    assert [line.split(": ")[2] for line in report["warnings"]] == ["license", "language"]
    assert (
        b"base_model:\n- org/seed\n- org/code\nbase_model_relation: merge" in repository(hub, "me/merged")["README.md"]
    )


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub: Hub, home: Path, tmp_path: Path) -> None:
    """The client reads pieces of 10 MB, and has one when the line is cut. Old ones (1.3) go on in the next run."""
    large = save_seed(tmp_path / "large", vocab_size=60_000)
    hub.add("org/large", large)
    hub.fail("GET .*/model.safetensors", "cut", times=1)
    arguments = ("--seed", large, "--expert", "code=org/large", "--json")
    done = btx(hub, home, "check", *arguments, token="")
    if done.returncode:
        assert "the download failed (" in error_of(done)
        done = btx(hub, home, "check", *arguments, token="")
    assert done.returncode == 0, done.stderr
    lines = hub.requests(lambda line: line.startswith("GET") and "model.safetensors" in line)
    assert [line.split()[2:] for line in lines] == [["200"], ["206", f"bytes={10 * 1024**2}-"]]
    (there,) = home.rglob("model.safetensors")
    assert there.read_bytes() == (large / "model.safetensors").read_bytes()
