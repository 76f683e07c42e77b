"""Time `btx merge` beside `cp -r` of its result, MixtureKit and mergekit, on made-up Llama checkpoints.

    python benchmarks/merge.py --mixturekit VENV --mergekit VENV   time, CPU and memory of a merge
    python benchmarks/merge.py --shape tiny --latency              what the short commands cost
    python benchmarks/merge.py --memory --contenders btx           peak memory by size

The contenders run in turns, each in a fresh process that is measured from outside (wait4). Before each
run the disk is synced and the run's input is read into the page cache or, with --drop-caches, the caches
are emptied. No run is made to wait until its result is on the disk. Linux only.
"""

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench

SHARD_BYTES = 5 * 10**9
CHUNK = 2**22  # values made at a time
DTYPES = {"bfloat16": (2, "BF16"), "float16": (2, "F16"), "float32": (4, "F32")}
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
# cp comes after btx, so that it finds a result in the first round too
CONTENDERS = {"btx": "btx merge", "cp": "cp -r", "mixturekit": "MixtureKit", "mergekit": "mergekit-moe"}
FIGURES = {"wall": "wall s", "cpu": "CPU s", "peak": "peak RSS MB"}


# ---- the checkpoints


@dataclasses.dataclass(frozen=True)
class Shape:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must divide hidden_size, num_key_value_heads the heads")
        if self.vocab_size < 259:
            raise ValueError(f"vocab_size is {self.vocab_size}; the tokenizer's bytes need 259 or more")

    def tensors(self) -> dict[str, tuple[int, ...]]:
        hidden, inner, vocabulary = self.hidden_size, self.intermediate_size, self.vocab_size
        narrow = hidden // self.num_attention_heads * self.num_key_value_heads
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
        for number in range(self.num_hidden_layers):
            named |= {f"model.layers.{number}.{name}.weight": dims for name, dims in layer.items()}
        named["model.norm.weight"] = (hidden,)
        return named if self.tie_word_embeddings else named | {"lm_head.weight": (vocabulary, hidden)}

    def parameters(self, experts: int = 1) -> int:
        """Of one checkpoint, or of the merge of `experts`."""
        blocks = self.num_hidden_layers * 3 * self.hidden_size * self.intermediate_size
        return sum(math.prod(dims) for dims in self.tensors().values()) + (experts - 1) * blocks

    def ten_times_larger(self) -> "Shape":
        """Twice as wide and 2.5 times as deep: ten times the layers' parameters."""
        wider = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        sizes = {name: 2 * getattr(self, name) for name in wider}
        return dataclasses.replace(self, **sizes, num_hidden_layers=math.ceil(2.5 * self.num_hidden_layers))


SHAPES = {
    "tiny": Shape(64, 176, 2, 4, 2, 512),
    "tinyllama": Shape(2048, 5632, 22, 32, 4, 32000),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
}


def chunks(name: str, count: int, dtype: str, expert: int) -> Iterator[memoryview]:
    """The seed's values are normal(0, 0.02), or 1 in a norm; an expert's differ by noise of 5 % of that."""
    import torch  # here and not above: a measured process starts at its parent's peak RSS

    def normal(key: str, size: int) -> torch.Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))

    scale = 1.0 if "norm" in name else 0.02
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        values = torch.ones(size) if "norm" in name else scale * normal(f"0 {name} {start}", size)
        if expert:
            values += 0.05 * scale * normal(f"{expert} {name} {start}", size)
        yield values.to(getattr(torch, dtype)).view(torch.uint8).numpy().data


def make_checkpoint(folder: Path, shape: Shape, dtype: str, expert: int) -> None:
    """Write expert number `expert`; 0 is the seed."""
    width, code = DTYPES[dtype]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shards: list[dict[str, Any]] = []
    end = SHARD_BYTES
    for name, dims in shape.tensors().items():
        start, end = end, end + width * math.prod(dims)
        if end > SHARD_BYTES:
            shards.append({})
            start, end = 0, end - start
        shards[-1][name] = {"dtype": code, "shape": dims, "data_offsets": [start, end]}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"model{part}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        header = json.dumps({"__metadata__": {"format": "pt"}} | shard).encode()
        header += b" " * (-len(header) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for name, entry in shard.items():
                out.writelines(chunks(name, math.prod(entry["shape"]), dtype, expert))
    if len(shards) > 1:
        index = {"metadata": {"total_size": width * shape.parameters()}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder, shape.vocab_size)
    config = dataclasses.asdict(shape) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))  # last: it means that the checkpoint is whole


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of bytes, filled up with tokens that no text reaches."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokens = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<unused_{number}>" for number in range(vocab_size - len(tokens))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


class NoSpace(Exception):
    """The disk cannot hold what was asked for."""


def make_sources(folder: Path, shape: Shape, dtype: str, experts: int, results: int) -> list[Path]:
    """The seed and the experts, where they are not left from an earlier run (--keep)."""
    recipe = zlib.crc32(repr((shape, dtype)).encode())
    sources = [folder / f"checkpoints-{recipe:08x}" / f"expert-{number}" for number in range(experts)]
    missing = [n for n, source in enumerate(sources) if not (source / "config.json").exists()]
    one, merged = (DTYPES[dtype][0] * shape.parameters(n) for n in (1, experts))
    needed, free = 1.02 * (len(missing) * one + results * merged), shutil.disk_usage(folder).free
    if needed > free:
        raise NoSpace(f"needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")
    say(f"{experts} checkpoints of {shape.parameters() / 1e6:,.1f} M parameters, {one / 1e6:,.1f} MB each")
    if missing:
        with multiprocessing.get_context("spawn").Pool(min(len(missing), os.cpu_count() or 1)) as pool:
            pool.starmap(make_checkpoint, [(sources[n], shape, dtype, n) for n in missing], chunksize=1)
    return sources


# ---- the contenders and their runs


@dataclasses.dataclass(frozen=True)
class Contender:
    name: str
    command: list[str]
    inputs: list[Path]


@dataclasses.dataclass(frozen=True)
class Run:
    contender: str
    round: int
    wall: float = 0.0  # seconds
    cpu: float = 0.0  # seconds, user and system, of all its processes
    peak: float = 0.0  # MB, of its largest process
    written: float = 0.0  # GB
    failure: str = ""  # why in one line, and the last lines of its output


def programs(options: argparse.Namespace) -> dict[str, str]:
    found = {"btx": Path(sys.executable).with_name("btx"), "cp": Path(shutil.which("cp") or "cp")}
    if options.mixturekit:
        found["mixturekit"] = options.mixturekit / "bin" / "mixturekit"
    if options.mergekit:
        found["mergekit"] = options.mergekit / "bin" / "mergekit-moe"
    return {name: str(path.absolute()) for name, path in found.items()}


def source_options(sources: list[Path]) -> list[str]:
    experts = (("--expert", f"{source.name}={source}") for source in sources[1:])
    return ["--seed", str(sources[0]), *itertools.chain(*experts)]


def merges(options: argparse.Namespace, folder: Path, sources: list[Path]) -> list[Contender]:
    out, kept = str(folder / "out"), folder / "kept"
    mergekit, mixturekit = folder / "mergekit.yaml", folder / "mixturekit.yaml"
    members = [{"source_model": str(source)} for source in sources]
    rest = {"base_model": str(sources[0]), "gate_mode": "random", "dtype": options.dtype}
    mergekit.write_text(json.dumps(rest | {"experts": members}))  # JSON is YAML
    members = [{"expert_name": source.name, "model_id": str(source)} for source in sources]
    rest = {"moe_method": "traditional", "model_type": "benchmarkmoe", "dtype": options.dtype}
    mixturekit.write_text(json.dumps(rest | {"experts": members}))
    arguments = {
        "btx": ["merge", *source_options(sources), "--quiet", "-o", out],
        "cp": ["-r", str(kept), out],
        "mixturekit": ["build", str(mixturekit), "--output", out],
        # It holds a shard in memory, 5 GB unless told. With 1 GB it is faster and smaller.
        "mergekit": [str(mergekit), out, "--out-shard-size", "1B", "--lazy-unpickle", "--quiet"],
    }
    found, inputs = programs(options), {"cp": [kept]}
    return [Contender(n, [found[n], *arguments[n]], inputs.get(n, sources)) for n in options.contenders]


def short_commands(options: argparse.Namespace, sources: list[Path]) -> list[Contender]:
    found = programs(options)
    names = [name for name in options.contenders if name != "cp"]
    helps = [Contender(f"{Path(found[name]).name} --help", [found[name], "--help"], []) for name in names]
    return [*helps, Contender("btx check", [found["btx"], "check", *source_options(sources)], sources)]


def measure(contender: Contender, number: int, folder: Path) -> Run:
    """One run in a fresh process. What it writes is in `folder`/out."""
    with open(folder / "log", "w+", errors="replace") as log:
        started = time.perf_counter()
        try:
            offline = os.environ | {"HF_HUB_OFFLINE": "1"}
            process = subprocess.Popen(contender.command, stdout=log, stderr=log, cwd=folder, env=offline)
        except OSError as error:
            return Run(contender.name, number, failure=f"failed: {error.strerror}: {error.filename}")
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        tail = "".join(log.readlines()[-15:])
    failure = f"failed: exit status {process.returncode}\n{tail}" if process.returncode else ""
    written = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
    return Run(contender.name, number, wall, cpu, peak / 1e6, written / 1e9, failure)


def orders(count: int, rounds: int) -> Iterator[list[int]]:
    """One order a round; in `count` rounds, twice that if odd, each follows each other equally often.

    Williams, "Experimental designs balanced for the estimation of residual effects of treatments", 1949.
    """
    first = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    for number in range(rounds):
        order = [(i + number) % count for i in first]
        yield order[::-1] if count % 2 and number // count % 2 else order


def race(contenders: list[Contender], rounds: int, folder: Path, drop_caches: bool) -> list[Run]:
    """All contenders in each round. One that failed does not run again."""
    out, kept = folder / "out", folder / "kept"
    for left in (out, kept):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    runs: list[Run] = []
    for number, order in enumerate(orders(len(contenders), rounds), 1):
        for contender in [contenders[i] for i in order]:
            failed = contender.name in {run.contender for run in runs if run.failure}
            if failed or not all(path.exists() for path in contender.inputs):
                continue
            os.sync()
            if drop_caches:
                DROP_CACHES.write_text("3\n")
            else:
                read_all(contender.inputs)
            run = measure(contender, number, folder)
            runs.append(run)
            figures = f"{run.wall:.2f} s, CPU {run.cpu:.2f} s, {run.peak:.0f} MB"
            say(f"round {number}: {run.contender}: {run.failure or figures}")
            for_cp = contender.name == "btx" or not kept.exists()
            if for_cp and out.exists() and not run.failure and "cp" in [c.name for c in contenders]:
                shutil.rmtree(kept, ignore_errors=True)
                out.rename(kept)
            shutil.rmtree(out, ignore_errors=True)
    return runs


def read_all(folders: list[Path]) -> None:
    buffer = bytearray(2**22)
    for path in [path for folder in folders for path in folder.rglob("*") if path.is_file()]:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# ---- the report


def report(runs: list[Run]) -> str:
    """The figures, then their ratios to a reference's figures of the same round."""
    usual = [name for name in CONTENDERS if name in (run.contender for run in runs)]
    names = dict.fromkeys([*usual, *(run.contender for run in runs)])
    done = {name: {run.round: run for run in runs if run.contender == name} for name in names}
    failed = {run.contender: run.failure.splitlines()[0] for run in runs if run.failure}
    rows = [[CONTENDERS.get(name, name), why, "", "", ""] for name, why in failed.items()]
    for name in failed:
        del done[name]
    for name, by_round in done.items():
        figures = [bench.spread([getattr(run, figure) for run in by_round.values()]) for figure in FIGURES]
        written = max(run.written for run in by_round.values())
        rows.append([CONTENDERS.get(name, name), *figures, f"{written:.3f}"])
    text = bench.table(["median [min-max]", *FIGURES.values(), "written GB"], rows)
    for reference in [name for name in ("cp", "synced", "mixturekit") if name in done]:
        rows = []
        for name in [name for name in done if name != reference]:
            pairs = [(done[name][n], done[reference][n]) for n in done[name] if n in done[reference]]
            ratios = [[getattr(a, key) / (getattr(b, key) or math.nan) for a, b in pairs] for key in FIGURES]
            rows.append([CONTENDERS[name], *(bench.spread(ratio) if ratio else "" for ratio in ratios)])
        text += bench.table([f"times {CONTENDERS[reference]}'s, by round", *FIGURES.values()], rows)
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return text + f"Peak RSS: no process can show less than this one's {floor:.0f} MB.\n"


def machine(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {
        "command": bench.command(),
        "CPU": f"{len(os.sched_getaffinity(0))} cores, {bench.cpu_name()}",
        "RAM": f"{memory / 1e9:.1f} GB",
        "kernel": platform.release(),
        "file system": output("df", "--output=fstype", str(folder)).split()[-1],
        "page cache": "dropped before each run" if options.drop_caches else "input read before each run",
    }
    packages = ("btx-merge", "mixturekit", "mergekit", "torch", "transformers", "safetensors")
    script = "import platform; from importlib.metadata import distributions\n"
    script += "versions = {d.name.lower(): d.version for d in distributions()}\n"
    script += f"have = [n + ' ' + versions[n] for n in {packages} if n in versions]\n"
    script += "print('Python ' + platform.python_version(), *have, sep=', ')"
    for name, path in programs(options).items():
        if name in options.contenders and (python := Path(path).with_name("python")).exists():
            facts[f"{CONTENDERS[name]}'s environment"] = output(str(python), "-c", script)
    return facts


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- the command


def parse(description: str | None = __doc__) -> tuple[argparse.Namespace, Shape]:
    parser = bench.parser_of(description, {})
    fields = [field.name for field in dataclasses.fields(Shape)]
    parser.add_argument("--shape", default="tinyllama", help=f"{', '.join(SHAPES)}, JSON, or a config.json")
    for name in fields[:6]:
        parser.add_argument("--" + name.replace("_", "-"), type=int, help="in place of the shape's")
    parser.add_argument("--experts", type=int, default=4, help="sources in all, the seed included (4)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mixturekit", type=Path, metavar="VENV", help="virtual environment with MixtureKit")
    parser.add_argument("--mergekit", type=Path, metavar="VENV", help="virtual environment with mergekit")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="which to run (all there are)")
    parser.add_argument("--drop-caches", action="store_true", help="start every run cold (as root)")
    parser.add_argument("--work-dir", type=Path, help="where the checkpoints go (a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave them there for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run to this file")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--latency", action="store_true", help="time the --help commands and `btx check`")
    modes.add_argument("--memory", action="store_true", help="merge 2, 16, and 2 ten times larger, once each")
    options = parser.parse_args()
    there = [name for name in CONTENDERS if name in programs(options)]
    if unknown := set(options.contenders or []) - set(there):
        parser.error(f"--contenders: where is it? give {' and '.join(f'--{name} VENV' for name in unknown)}")
    options.contenders = [name for name in there if name in (options.contenders or there)]
    if options.rounds < 1 or options.experts < 2:
        parser.error("--rounds must be 1 or more, --experts 2 or more")
    if options.contenders == ["cp"]:
        parser.error("--contenders: cp copies another contender's result; name one more")
    if options.drop_caches and not os.access(DROP_CACHES, os.W_OK):
        parser.error("--drop-caches needs root")
    own = {name: value for name in fields[:6] if (value := getattr(options, name)) is not None}
    try:
        if options.shape in SHAPES:
            return options, dataclasses.replace(SHAPES[options.shape], **own)
        given = json.loads(options.shape if "{" in options.shape else Path(options.shape).read_text())
        return options, Shape(**{name: given[name] for name in fields if name in given} | own)
    except (OSError, TypeError, ValueError) as error:
        parser.error(f"the shape: {error}")


def race_once(options: argparse.Namespace, shape: Shape, folder: Path) -> list[Run]:
    if options.latency:
        sources = make_sources(folder, shape, options.dtype, options.experts, results=0)
        contenders = short_commands(options, sources)
    else:  # two results at a time: the one that cp copies and the one that is being written
        results = 2 if "cp" in options.contenders else 1
        sources = make_sources(folder, shape, options.dtype, options.experts, results)
        contenders = merges(options, folder, sources)
    return race(contenders, options.rounds, folder, options.drop_caches)


def race_sizes(options: argparse.Namespace, shape: Shape, folder: Path) -> list[Run]:
    """One run for each size that fits the disk."""
    options.contenders = [name for name in options.contenders if name != "cp"]
    runs: list[Run] = []
    for size, counts in ((shape, (2, 16)), (shape.ten_times_larger(), (2,))):
        for experts in counts:
            label = f"{experts} of {size.parameters() / 1e6:,.1f} M"
            try:
                sources = make_sources(folder, size, options.dtype, experts, results=1)
            except NoSpace as error:
                runs.append(Run(label, 1, failure=f"skipped: {error}"))
                say(f"{label}: {runs[-1].failure}")
                continue
            contenders = merges(options, folder, sources)
            contenders = [dataclasses.replace(c, name=f"{c.name}, {label}") for c in contenders]
            runs += race(contenders, 1, folder, options.drop_caches)
        if not options.keep:
            for checkpoints in folder.glob("checkpoints-*"):
                shutil.rmtree(checkpoints)
    return runs


def main() -> int:
    options, shape = parse()
    root = Path(options.work_dir or tempfile.mkdtemp()).absolute()
    folder = root / "btx-benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        facts = machine(options, folder)
        runs = (race_sizes if options.memory else race_once)(options, shape, folder)
    except NoSpace as error:
        say(f"error: {folder}: {error}")
        return 1
    finally:
        for result in ("out", "kept"):
            shutil.rmtree(folder / result, ignore_errors=True)
        if not options.keep:
            shutil.rmtree(folder if options.work_dir else root, ignore_errors=True)
    experts = "" if options.memory else f"{options.experts} of "
    facts = {"checkpoints": f"{experts}{json.dumps(vars(shape))}, {options.dtype}"} | facts
    print(bench.listed(facts) + report(runs), end="")
    if options.json:
        about = {"machine": facts, "shape": vars(shape), "experts": options.experts, "dtype": options.dtype}
        options.json.write_text(json.dumps(about | {"runs": [vars(run) for run in runs]}, indent=2) + "\n")
    return 1 if any(run.failure.startswith("failed") for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
