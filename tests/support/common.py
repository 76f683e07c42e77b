"""Tiny real checkpoints, saved by transformers, and what several test modules ask of a merged one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from btx_merge import Check, InputError
from btx_merge.reporting import Reporter
from btx_merge.sources.segments import Segment

VOCAB, HIDDEN, WIDTH, LAYERS = 128, 64, 96, 2
WORDS = [f"w{number}" for number in range(VOCAB - 2)]

WITHOUT_BTX_MERGE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "btx_merge":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""
"""The beginning of a script for a machine on which this package is not installed."""


class Told(Reporter):
    """Passes on what it is told to the callables that are given by its methods' names."""

    def __init__(self, **heard: Callable[..., object]):
        assert heard.keys() <= vars(Reporter).keys()
        vars(self).update(heard)


def tiny_config(**changes: Any) -> LlamaConfig:
    """A Llama with grouped queries and everything small. Word ids, then <s> and </s>."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": VOCAB - 2,
        "eos_token_id": VOCAB - 1,
    }
    return LlamaConfig(**{**values, **changes})


TINY_CONFIG = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 126,
    "eos_token_id": 127,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
"""What config.json says of the size of everything that is made of such a Llama."""


def tiny_tokenizer(added: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A real tokenizer: one id per word; with words added as add_tokens adds them."""
    vocab = {word: number for number, word in enumerate([*WORDS, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if added:
        fast.add_tokens(added)
    return fast


def move_trainable(model: torch.nn.Module) -> None:
    """Add noise to everything that a model would train: an adapter begins as one that changes nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def save_seed(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, tokenizer: bool = True, **config: Any
) -> Path:
    """A freshly initialised Llama with norms that are not all 1 and biases that are not all 0."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def grow(
    seed_folder: Path,
    folder: Path,
    *,
    noise: float = 0.1,
    random_seed: int = 1,
    change: Callable[[LlamaForCausalLM], Any] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **save: Any,
) -> Path:
    """A checkpoint grown from a seed: every weight moved by `noise` times the tensor's deviation."""
    model = LlamaForCausalLM.from_pretrained(seed_folder)
    generator = torch.Generator().manual_seed(random_seed)
    with torch.no_grad():
        for parameter in model.parameters():
            deviation = parameter.float().std().clamp(min=0.01)
            parameter.add_((noise * deviation * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    if change is not None:
        change(model)
    model.save_pretrained(folder, **save)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif (seed_folder / "tokenizer.json").exists():
        tiny_tokenizer().save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a saved checkpoint, sharded or not."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            out |= {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    return out


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes as they lie in a file."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def load_float32(folder: Path) -> Any:
    """A checkpoint, dense or merged, in evaluation mode and in float32, which holds bf16 and fp16 exactly."""
    from transformers import AutoModelForCausalLM

    import btx_merge  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """Logits for two fixed sequences that hold many different tokens, [2, T, V]."""
    return model((torch.arange(60).reshape(2, 30) * 37) % VOCAB).logits


def force_expert(model: Any, expert: int) -> None:
    """From now on every token of every layer goes to this expert alone, by the model's own routing."""
    model.config.num_experts_per_tok = 1
    one_hot = torch.eye(model.config.num_local_experts)[expert]
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, inputs, logits: one_hot.expand_as(logits))


def assert_rounded_once(ours: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    """`ours` is `exact` (float64), summed in float32 and then rounded once to its dtype.

    Allowed are half a unit in the last place of the dtype, and four units of float32 relative to the terms'
    `magnitude`: one for each addition, and one for the division.
    """
    info = torch.finfo(ours.dtype)
    half_unit = (info.eps * exact.abs()).clamp(min=info.tiny * info.eps) / 2
    allowed = half_unit + 4 * torch.finfo(torch.float32).eps * magnitude
    assert ours.shape == exact.shape
    assert ((ours.double() - exact).abs() <= allowed).all()
    if ours.dtype != torch.float32:  # rounded twice, or summed in fewer bits, many would miss the nearest
        assert (ours != exact.to(ours.dtype)).double().mean() < 0.002


def problems_of(function: Callable[..., object], *arguments: Any, **options: Any) -> list[str]:
    """The lines of a refusal."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert caught.value.problems
    return [str(problem) for problem in caught.value.problems]


def without_next(stderr: str) -> str:
    """What a command told on stderr, but for the lines that name the commands which come next."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith("next: "))


def assert_complete(folder: Path) -> None:
    """A merged folder has every tensor that its model wants, finite, and nothing unfinished beside it."""
    from transformers import AutoModelForCausalLM

    import btx_merge  # noqa: F401

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], info
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert not folder.with_name(folder.name + ".btx-partial").exists()
    assert not list(folder.glob("btx_journal*"))
    assert not list(folder.glob("btx_lock*"))


def edit_json(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; a value of None removes the key."""
    values = json.loads(file.read_text())
    values.update(changes)
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def rows_are_shared(checked: Check) -> bool:
    """Return whether every source of a merge has the result's tokens in the result's rows."""
    vocabulary = checked.plan.vocabulary
    return all(rows == (Segment(0, 0, vocabulary.size),) for rows in vocabulary.segments.values())
