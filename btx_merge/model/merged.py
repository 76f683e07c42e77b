"""A merged model's folder: its config, its experts by name, and each of them as the dense Llama that it came from.

Experts lie in fused tensors, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I], so the gate, up and down projection
of each is a range of bytes, which can be copied.

Legend: E experts, I width of one, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from btx_merge.architectures.btx import DOWN_EXPERTS, GATE_UP_EXPERTS, expert_names, experts_by_domain, merged_shapes
from btx_merge.architectures.config_values import layer_problems, refuse_odd_values
from btx_merge.architectures.llama import DOWN, GATE, UP, expected_tensors, normalise_config
from btx_merge.checkpoints.dtypes import STORED
from btx_merge.checkpoints.stored import StoredTensor, join, part_of
from btx_merge.errors import InputError, Problem, capped
from btx_merge.files.folder import file_problems, opening
from btx_merge.model.other_folders import merged_config
from btx_merge.reporting import short
from btx_merge.sources.locate import SMALL_FILES, Located
from btx_merge.sources.tensors import read_tensors

_MOST = 10_000
"""Layers, and experts, of a model that is described by its config alone."""


@dataclass(frozen=True, eq=False)
class MergedModel:
    """A checkpoint of `btx merge`, opened without reading weights."""

    located: Located
    config: Mapping[str, Any]
    """config.json as it lies."""
    tensors: Mapping[str, StoredTensor]

    @property
    def num_experts(self) -> int:
        number: int = self.config["num_local_experts"]
        return number

    @property
    def num_experts_per_tok(self) -> int:
        """K of top-k; other routers may run another number of experts."""
        number: int = self.config.get("num_experts_per_tok", 2)
        return number

    @property
    def router_type(self) -> str:
        """How its routers choose; a model from elsewhere may have any value there."""
        kind: str = self.config.get("router_type", "top_k")
        return kind

    @property
    def num_layers(self) -> int:
        number: int = self.config["num_hidden_layers"]
        return number

    @cached_property
    def expert_names(self) -> list[str]:
        return expert_names(self.config)

    @property
    def num_chunks(self) -> int:
        """How many experts each source was split into; otherwise 1."""
        number: int = self.config.get("num_chunks", 1)
        return number

    @cached_property
    def domains(self) -> list[str]:
        """The experts' names, those of a split source once."""
        return list(experts_by_domain(self.config))

    @cached_property
    def dense_config(self) -> dict[str, Any]:
        """The config of a dense Llama in it, normalised (`llama.normalise_config`)."""
        width = self.config["intermediate_size"] * self.num_chunks
        return normalise_config({**self.config, "intermediate_size": width})

    @property
    def dtype(self) -> str:
        """safetensors' name of the experts' dtype."""
        return self.tensors[GATE_UP_EXPERTS.format(layer=0)].dtype

    def experts_of(self, domain: str) -> list[int]:
        """Return the numbers of the experts that a source became: one, or its chunks.

        Raises:
            InputError: there are none of that name.
        """
        numbers = experts_by_domain(self.config).get(domain)
        if numbers is None:
            found, expected = f"no expert {domain!r}", f"one of {', '.join(self.domains)}"
            raise InputError([Problem("model", "config.json: expert_names", found, expected)])
        return numbers

    def gate_up(self, layer: int, expert: int) -> tuple[StoredTensor, StoredTensor]:
        """Return an expert's gate_proj and up_proj, [I, H] each."""
        fused = self.tensors[GATE_UP_EXPERTS.format(layer=layer)]
        width = fused.shape[1] // 2
        return part_of(fused, expert, 0, width), part_of(fused, expert, width)

    def down(self, layer: int, expert: int) -> StoredTensor:
        """Return an expert's down_proj, [H, I]."""
        return part_of(self.tensors[DOWN_EXPERTS.format(layer=layer)], expert)

    @property
    def shared_tensors(self) -> dict[str, StoredTensor]:
        """Everything that belongs to no feed-forward block."""
        return {name: tensor for name, tensor in self.tensors.items() if ".mlp." not in name}

    def dense_tensors(self, domain: str) -> dict[str, StoredTensor]:
        """Return the tensors of a dense Llama, in its order: one source's feed-forward blocks, the merged shared
        weights.

        Raises:
            InputError: there is no expert of that name.
        """
        numbers = self.experts_of(domain)
        blocks: dict[str, StoredTensor] = {}
        for layer in range(self.num_layers):
            gates, ups = zip(*(self.gate_up(layer, number) for number in numbers), strict=True)
            blocks[GATE.format(layer=layer)] = join(gates)
            blocks[UP.format(layer=layer)] = join(ups)
            blocks[DOWN.format(layer=layer)] = join([self.down(layer, n) for n in numbers], by_columns=True)
        return {name: blocks.get(name) or self.tensors[name] for name in expected_tensors(self.dense_config)}


def open_merged(located: Located) -> MergedModel:
    """Open a merged model's folder.

    Raises:
        InputError: no checkpoint of `btx merge`; or tensors that are missing, unexpected or of another shape than
            its config says. All problems in one error.
    """
    with opening("model", located.folder):
        config = _checked_config(located)
        model = MergedModel(located, config, read_tensors("model", located.folder))
        problems = list(layer_problems("model", config, model.tensors)) or list(_tensor_problems(model))
        if problems:
            raise InputError(problems)
        return model


def open_config(located: Located) -> MergedModel:
    """Return a merged model without tensors, whose weights may be elsewhere.

    Raises:
        InputError: no checkpoint of `btx merge`, or a config that none can have.
    """
    with opening("model", located.folder):
        config = _checked_config(located)
        problems = [
            Problem("model", f"config.json: {key}", f"{config[key]:,}", f"at most {_MOST:,}")
            for key in ("num_hidden_layers", "num_local_experts")
            if config[key] > _MOST
        ]
        if problems:
            raise InputError(problems)
        return MergedModel(located, config, {})


def _checked_config(located: Located) -> dict[str, Any]:
    if odd := list(file_problems(located.folder, SMALL_FILES)):
        raise InputError(odd)
    config = merged_config(located.folder)
    if problems := list(_config_problems(config)):
        raise InputError(problems)
    return config


def _config_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        refuse_odd_values("model", config)
    except InputError as error:
        yield from error.problems
    for key in ("num_hidden_layers", "intermediate_size", "hidden_size", "vocab_size"):
        if config.get(key) is None:
            yield Problem("model", f"config.json: {key}", "missing", "a whole number above 0")
    experts, names = config.get("num_local_experts"), config.get("expert_names")
    if not isinstance(experts, int) or not _is_count(experts):
        yield Problem("model", "config.json: num_local_experts", short(experts), "a whole number above 0")
        return
    per_token, chunks = config.get("num_experts_per_tok", 2), config.get("num_chunks", 1)
    if not _is_count(per_token) or per_token > experts:
        expected = f"a whole number in [1, {experts}], the number of experts"
        yield Problem("model", "config.json: num_experts_per_tok", f"{per_token!r}", expected)
    if not _is_count(chunks) or experts % chunks:
        yield Problem("model", "config.json: num_chunks", f"{chunks!r}", f"a divisor of the {experts} experts")
    fine = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and not (fine and len(set(names)) == len(names) == experts):
        yield Problem("model", "config.json: expert_names", short(names), f"{experts} different names")
        return
    if names and _is_count(chunks) and chunks > 1 and not _are_of_chunks(names, chunks):
        expected = f"the names of each source's {chunks} chunks in order, such as code.0 to code.{chunks - 1}"
        yield Problem("model", "config.json: expert_names", short(names), expected)
    active = config.get("active_experts")
    if active is not None and not _are_experts(active, experts, names or []):
        expected = f"a list of different experts, by name or number in [0, {experts})"
        yield Problem("model", "config.json: active_experts", short(active), expected)


def _are_of_chunks(names: list[str], chunks: int) -> bool:
    """Return whether names are those of sources that were split, all chunks of one source beside each other."""
    for number, name in enumerate(names):
        source = names[number - number % chunks].rpartition(".")[0]
        if not source or name != f"{source}.{number % chunks}":
            return False
    return True


def _are_experts(active: Any, experts: int, names: list[str]) -> bool:
    """Return whether a value is a list of different experts."""
    numbers = []
    for expert in active if isinstance(active, list) else []:
        if isinstance(expert, str) and expert in names:
            numbers.append(names.index(expert))
        elif type(expert) is int and 0 <= expert < experts:
            numbers.append(expert)
        else:
            return False
    return 0 < len(numbers) == len(set(numbers))


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _tensor_problems(model: MergedModel) -> Iterator[Problem]:
    expected = merged_shapes(model.config)
    remedy = "Weights and config.json must be of one model: write it again."
    missing = sorted(expected.keys() - model.tensors.keys())
    unexpected = sorted(model.tensors.keys() - expected.keys())
    yield from capped(
        [
            Problem("model", f"tensor {name}", "missing", f"{list(expected[name])} by config.json", remedy)
            for name in missing
        ]
    )
    yield from capped(
        [Problem("model", f"tensor {name}", "unexpected", "a BTX model's tensors only", remedy) for name in unexpected]
    )
    for name in sorted(expected.keys() & model.tensors.keys()):
        tensor = model.tensors[name]
        if tensor.shape != expected[name]:
            found, wanted = f"shape {list(tensor.shape)}", f"{list(expected[name])} by config.json"
            yield Problem("model", f"{tensor.file.name}: {name}", found, wanted, remedy)
        elif tensor.dtype not in STORED:
            wanted = f"one of {', '.join(STORED)}"
            yield Problem("model", f"{tensor.file.name}: {name}", f"dtype {tensor.dtype}", wanted)
