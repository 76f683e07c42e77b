"""A tokenizer's files: how they are found and copied, and whether two folders read texts alike."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from btx_merge.errors import InputError, Problem
from btx_merge.files.folder import copy_file, read_bytes, read_json, write_json
from btx_merge.reporting import first_line

TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps chat templates under names, beside the default one."""
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
"""The default chat template, where tokenizer_config.json does not hold it."""
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt")
"""What says which token a text becomes."""
SPEECH_FILES = ("tokenizer_config.json", "special_tokens_map.json", *TEMPLATE_FILES)
"""What says which tokens are special and how a conversation is written."""
TOKENIZER_FILES = (*VOCABULARY_FILES, *SPEECH_FILES)

NO_SENTENCEPIECE = "cannot be read: sentencepiece is not installed"

# paths of the machine that saved it, and code
PRIVATE_KEYS = ("auto_map", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file")

_LINES = (
    "Hello world",
    "  two spaces in front,  two within, two behind  ",
    "\n\na\tb\r\n",
    "def f(x):\n    return x ** 2  # code\n",
    "Grüße, naïve café — 北京 Привет مرحبا 🙂",
    "x = 12345.678",
)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer in any of the forms that Llama models have."""
    names = ("tokenizer.json", "tokenizer.model")
    as_gpt2 = all((folder / name).exists() for name in ("vocab.json", "merges.txt"))
    return as_gpt2 or any((folder / name).exists() for name in names)


def no_tokenizer(name: str, folder: Path) -> list[Problem]:
    """Return that a model's folder has no tokenizer, where it has none."""
    expected = "tokenizer.json or tokenizer.model"
    return [] if has_tokenizer(folder) else [Problem(name, str(folder), "no tokenizer", expected)]


def has_speech(folder: Path) -> bool:
    """Return whether a folder says anything about special tokens or chat templates."""
    return any((folder / name).exists() for name in (*SPEECH_FILES, TEMPLATES))


def copy_files(names: tuple[str, ...], source: Path, folder: Path) -> None:
    """Copy those of the named files that are there."""
    for name in names:
        if os.path.lexists(source / name):
            copy_file(source / name, folder / name)


def copy_templates(source: Path, folder: Path) -> None:
    """Copy the chat templates that have names."""
    for file in sorted((source / TEMPLATES).glob("*.jinja")):
        (folder / TEMPLATES).mkdir(exist_ok=True)
        copy_file(file, folder / TEMPLATES / file.name, source)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy all that a tokenizer consists of, its chat templates among it."""
    copy_files(TOKENIZER_FILES, source, folder)
    copy_templates(source, folder)


def load_tokenizer(folder: Path) -> Any:
    """Return what transformers reads texts with.

    Raises:
        InputError: transformers cannot read it; a package that it lacks is named.
    """
    from transformers import AutoTokenizer

    where = f"{folder.name}/{vocabulary_file(folder)}"
    if where.endswith("tokenizer.model"):
        _check_sentencepiece(folder / "tokenizer.model", where)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of any kind: transformers has code for every family
        found = f"unreadable tokenizer ({type(error).__name__}: {first_line(error)})"
        remedy = "Save it again with tokenizer.save_pretrained, or copy the seed's."
        raise InputError([Problem("model", where, found, "what transformers can read", remedy)]) from error


def _check_sentencepiece(file: Path, where: str) -> None:
    """Refuse a tokenizer.model that is damaged. transformers reads one as empty, or calls it another kind of file.

    Raises:
        InputError: `sentencepiece` cannot read it, or is not installed.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        problem = Problem("model", where, NO_SENTENCEPIECE, "", "Run: pip install sentencepiece")
        raise InputError([problem]) from error
    content, processor = read_bytes(file), SentencePieceProcessor()
    try:
        is_one = processor.LoadFromSerializedProto(content)
    except RuntimeError:
        is_one = False
    if not is_one:
        remedy = "Download it again, or save the tokenizer with tokenizer.save_pretrained: that writes tokenizer.json."
        raise InputError([Problem("model", where, "damaged", "a model of sentencepiece", remedy)])


def vocabulary_file(folder: Path) -> str:
    """Return the name of the file that a folder's tokens come from."""
    return next((name for name in VOCABULARY_FILES if (folder / name).exists()), "merges.txt")


def check_alike(ours: Any, folder: Path) -> None:
    """Encode lines with a model's tokenizer and with that of a folder.

    Raises:
        InputError: they read a line differently, or the folder's cannot be read.
    """
    theirs = load_tokenizer(folder)
    special = [*dict.fromkeys(str(token) for token in (ours.all_special_tokens or []))]
    lines = [*_LINES, *(f"{token}{line}" for token in special[:8] for line in ("after it", "  two spaces", "\nline"))]
    lines += [f"[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi {token} there [/INST]" for token in ["", *special[:8]]]
    lines += _conversations(ours)
    for line in lines:
        before, after = (list(one(line)["input_ids"]) for one in (ours, theirs))
        if before != after:
            found = f"{line!r} is read as {after[:12]} instead of {before[:12]}"
            remedy = "This is a fault of btx-merge: please report it with the model's tokenizer files."
            raise InputError([Problem("model", "tokenizer", found, "every text read as the model reads it", remedy)])


def _conversations(tokenizer: Any) -> list[str]:
    """Return a short conversation as each of the chat templates writes it; not those that want other roles."""
    import jinja2

    templates = tokenizer.chat_template
    names = list(templates) if isinstance(templates, dict) else [None] if templates else []
    messages = [{"role": "user", "content": "Hi,  there"}, {"role": "assistant", "content": "Hello"}]
    out = []
    for name in names:
        try:
            out.append(str(tokenizer.apply_chat_template(messages, chat_template=name, tokenize=False)))
        except (jinja2.TemplateError, TypeError, ValueError):
            # A template may refuse this conversation (raise_exception) or want tools and documents. It is a text that
            # travels as it is, so nothing is lost: only these lines are not compared.
            continue
    return out


def write_portable(source: Path, folder: Path) -> Any:
    """Write a model's tokenizer so that transformers 4 and 5 read texts as the model does, for any kind of model.

    Returns the model's own tokenizer, which takes a second to load.

    transformers 5 takes `LlamaTokenizer`, which builds its own rules, for some kinds of model and what tokenizer.json
    says for others. So tokenizer.json gets the rules that the model's own tokenizer has.

    Raises:
        InputError: transformers cannot read the model's tokenizer.
    """
    tokenizer = load_tokenizer(source)
    copy_files(("tokenizer.json", "tokenizer.model", *SPEECH_FILES), source, folder)
    copy_templates(source, folder)
    file = folder / "tokenizer_config.json"
    before = read_json(file) if file.exists() else {}
    config = {key: value for key, value in before.items() if key not in PRIVATE_KEYS}
    if type(tokenizer).__name__ != "TokenizersBackend" or not (folder / "tokenizer.json").exists():
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key in ("legacy", "add_prefix_space", "sp_model_kwargs", "added_tokens_decoder"):  # tokenizer.json says it
            config.pop(key, None)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):  # LlamaTokenizer's defaults among them
            if getattr(tokenizer, name, None) is not None:
                config.setdefault(name, str(getattr(tokenizer, name)))
    if config.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config != before:
        write_json(file, config)
    return tokenizer
