"""The model card: what was merged, how, from which revisions. No path of the user's machine stands in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import metadata as package_metadata
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from btx_merge.merging.experts import own_experts
from btx_merge.merging.plan import Plan
from btx_merge.merging.recipe import REGMEAN_METHODS
from btx_merge.model.held_out import MODEL_INDEX, model_index, router_results, router_table
from btx_merge.sources.cards import code_in_card, is_web_link
from btx_merge.sources.locate import Located
from btx_merge.sources.source import Source

if TYPE_CHECKING:
    from btx_merge.fitting.walk import LayerFit


LICENCE_KEYS = ("license", "license_name", "license_link")
ROUTERS_TITLE = "## Routers"
UNTRAINED = "**They have not been trained yet**: finetune them before you judge the model."
_PATH_COMMENT = "  # the folder of this model, or its id on the Hub"
_PATH_LINE = re.compile(rf'^path = "[^"\n]*"{re.escape(_PATH_COMMENT)}$', re.MULTILINE)
PAPER = "https://arxiv.org/abs/2403.07816"
CITATION_TITLE = "## Citation"
CITATION = f"""{CITATION_TITLE}

The method is Branch-Train-MiX:

```bibtex
@misc{{sukhbaatar2024branchtrainmix,
  title = {{Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM}},
  author = {{Sainbayar Sukhbaatar and Olga Golovneva and Vasu Sharma and Hu Xu and Xi Victoria Lin and
            Baptiste Rozi{{\\`e}}re and Jacob Kahn and Daniel Li and Wen-tau Yih and Jason Weston and Xian Li}},
  year = {{2024}},
  eprint = {{2403.07816}},
  archivePrefix = {{arXiv}},
  primaryClass = {{cs.CL}},
  url = {{{PAPER}}}
}}
```
"""


def model_card(plan: Plan, layers: Sequence[LayerFit] = ()) -> str:
    """Return README.md of the result: metadata for the Hub, then text and a snippet that runs.

    Args:
        layers: how the routers came out that were fitted by ridge regression.
    """
    recipe, seed = plan.recipe, plan.seed
    title = f"{len(plan.sources)} Llama models merged by Branch-Train-MiX"
    metadata = card_metadata(plan)
    if layers:
        metadata[MODEL_INDEX] = model_index(title, router_results(layers, recipe.domain_text))
    rows = "\n".join(source_row(plan, source) for source in plan.sources)
    chunked = {
        "whole": "One expert per source, its feed-forward blocks unchanged.",
        "split": f"Each source's feed-forward blocks are split into {plan.chunks} experts.",
        "blend": "Each expert is blended from a part of every source's feed-forward blocks.",
    }[recipe.expert_mode]
    deviation = recipe.router_std or seed.config["initializer_range"]
    router = {
        "random": f"random, normal with standard deviation {deviation}. {UNTRAINED}",
        "zeros": f"zeros: every expert is equally likely. {UNTRAINED}",
        "ridge": f"fitted by ridge regression, layer by layer, on {recipe.domain_tokens:,} tokens per domain.",
        "prompts": "the mean inputs of a few prompts per expert.",
    }[recipe.router_init]
    folded = " Each expert absorbed its own norm (`fold_norms`)." if recipe.fold_norms else ""
    figures = f"{ROUTERS_TITLE}\n\n{router_table(layers)}\n" if layers else ""
    body = f"""
# {title}

A Mixture of Experts of {plan_sizes(plan)}, made by
[Branch-Train-MiX]({PAPER}) with {project_link()}.

| source | model | revision | expert |
|---|---|---|---|
{rows}

- Experts: {chunked}{folded}
- Attention, embeddings, norms and head: `{recipe.combine}` over {combined_over(recipe.combine, plan.experts)}.
- Routers: `{recipe.router_type}`; {router}
- The whole recipe, with all defaults and seeds: `btx_recipe.yaml`.

{how_to_use(", trust_remote_code=True")}
transformers 5 is needed. With btx-merge installed, `import btx_merge` replaces `trust_remote_code=True`.

{figures}{CITATION}"""
    return with_metadata(metadata, body)


def with_metadata(metadata: Mapping[str, Any], body: str) -> str:
    """Return a card: the YAML block that the Hub reads, and the text."""
    return f"---\n{yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)}---\n{body}"


def project_link() -> str:
    """Return this package's name for a card, as a link to its home where the package's metadata name one."""
    urls = [str(url).partition(", ")[2] for url in package_metadata("btx-merge").get_all("Project-URL") or []]
    return f"[btx-merge]({urls[0]})" if urls else "btx-merge"


def how_to_use(arguments: str = "") -> str:
    """The card's section with code that runs. `arguments` go to every `from_pretrained`."""
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

{path_line(".")}
tokenizer = AutoTokenizer.from_pretrained(path{arguments})
model = AutoModelForCausalLM.from_pretrained(path{arguments}, dtype="auto")
inputs = tokenizer("The answer is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```
"""


def path_line(path: str) -> str:
    """Return the line of a card's code that says where the model lies."""
    return f'path = "{path}"{_PATH_COMMENT}'


def with_path(card: str, path: str) -> str:
    """Return a card whose code finds the model there: `.` for its own folder, `org/name` for a repository."""
    return _PATH_LINE.sub(lambda match: path_line(path), card)


def count(number: int) -> str:
    """A number of parameters as people write it."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def sizes(parameters: int, active: int, per_token: int, experts: int) -> str:
    """The sizes of a model as its card gives them."""
    routed = f"per token ({per_token} of {experts} experts)"
    return f"{count(parameters)} parameters, {count(active)} of them active\n{routed}"


def plan_sizes(plan: Plan) -> str:
    """Those of a planned model."""
    return sizes(plan.parameters, plan.active_parameters, plan.experts_per_token, plan.num_experts)


def card_metadata(plan: Plan) -> dict[str, Any]:
    """The YAML block that the Hub reads. `base_model` names published models, never a folder."""
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["btx", "branch-train-mix", "mixture-of-experts", "merge"],
    }
    bases = [repo_id for source in plan.sources for repo_id in published(source)]
    if bases:
        metadata["base_model"] = list(dict.fromkeys(bases))
        metadata["base_model_relation"] = "merge"
    cards = [source.card_metadata() for source in plan.sources]
    licences = [{key: card[key] for key in LICENCE_KEYS if key in card} for card in cards]
    if licences[0].get("license") and all(licence == licences[0] for licence in licences):
        metadata |= licences[0]
        link_licence(metadata, plan.seed.located)
    if known := languages(cards):
        metadata["language"] = known
    return metadata


def languages(cards: Sequence[Mapping[str, Any]]) -> list[str]:
    """All that cards name, each once."""
    given = [card.get("language") or [] for card in cards]
    lists = [value if isinstance(value, list) else [value] for value in given]
    return list(dict.fromkeys(code for values in lists for code in values if isinstance(code, str)))


def published(source: Source) -> list[str]:
    """The source's id on the Hub; of a local folder, the models that its own card says it came from."""
    if source.located.repo_id:
        return [source.located.repo_id]
    return hub_ids(source.card_metadata().get("base_model"))


def hub_ids(given: Any) -> list[str]:
    """What of a card's `base_model`, a name or a list of them, can be ids on the Hub."""
    candidates = given if isinstance(given, list) else [given]
    texts = [candidate for candidate in candidates if isinstance(candidate, str)]
    return [text for text in texts if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text)]


def link_licence(metadata: dict[str, Any], located: Located) -> None:
    """Links a licence that is a file beside a model's card, which does not come along; or leaves the link out."""
    link = metadata.get("license_link")
    if not link or (isinstance(link, str) and is_web_link(link)):
        return
    del metadata["license_link"]
    is_file = isinstance(link, str) and re.fullmatch(r"[\w ./-]+", link) and ".." not in link.split("/")
    if located.repo_id and is_file:
        file = quote(link.removeprefix("./"))
        metadata["license_link"] = f"https://huggingface.co/{located.repo_id}/blob/{located.revision}/{file}"


def source_row(plan: Plan, source: Source) -> str:
    """A source's line in the card's table."""
    located = source.located
    if located.repo_id:
        model = f"[{located.repo_id}](https://huggingface.co/{located.repo_id})"
    else:
        model = f"{code_in_card(located.public_name)} (a local folder)"
    if source.base:
        model += f", an adapter on {code_in_card(source.base.public_name)}"
    return f"| {source.name} | {model} | {located.revision or ''} | {expert_numbers(plan, source)} |"


def expert_numbers(plan: Plan, source: Source) -> str:
    """The experts that a source became, as the card's table names them."""
    if source not in plan.experts:
        return "none"
    if plan.recipe.expert_mode == "blend":
        return "in every one"
    return ", ".join(map(str, own_experts(source.name, plan.expert_names)))


def combined_over(combine: str, experts: Sequence[Source]) -> str:
    """Whose shared weights were combined."""
    if combine == "seed":
        return "the seed alone"
    if combine in ("mean", "dare_linear", "ties", "dare_ties", *REGMEAN_METHODS):
        return ", ".join(f"`{source.name}`" for source in experts)
    return ", ".join(f"`{source.name}` ({source.weight:g})" for source in experts)
