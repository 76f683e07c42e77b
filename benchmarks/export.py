"""Time `btx export` and `btx extract` beside `cp -r` of their results, on a merge of made-up Llama checkpoints.

    python benchmarks/export.py --rounds 4

Runs, measures and reports as benchmarks/merge.py does, whose options it has (of --contenders, btx and cp; no --memory,
no --latency).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import merge
from merge import Contender, NoSpace, make_sources, programs, race, report, say, source_options


def main() -> int:
    options, shape = merge.parse(__doc__)
    options.contenders = ["btx", "cp"]
    root = Path(options.work_dir or tempfile.mkdtemp()).absolute()
    folder = root / "btx-benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    model, out, kept = folder / "model", folder / "out", folder / "kept"
    facts, btx, failed = merge.machine(options, folder), programs(options)["btx"], False
    print("\n".join(f"- {fact}: {value}" for fact, value in facts.items()), end="\n\n")
    try:
        sources = make_sources(folder, shape, options.dtype, options.experts, results=2)
        subprocess.run([btx, "merge", *source_options(sources), "--overwrite", "-q", "-o", str(model)], check=True)
        if not options.keep:  # room for the results
            shutil.rmtree(sources[0].parent)
        for verb, rest in {"export": [str(out)], "extract": [sources[1].name, "-o", str(out)]}.items():
            merge.CONTENDERS["btx"] = f"btx {verb}"
            contenders = [
                Contender("btx", [btx, verb, str(model), *rest, "--quiet"], [model]),
                Contender("cp", [programs(options)["cp"], "-r", str(kept), str(out)], [kept]),
            ]
            runs = race(contenders, options.rounds, folder, options.drop_caches)
            failed |= any(run.failure for run in runs)
            print(report(runs))
    except NoSpace as error:
        say(f"error: {folder}: {error}")
        return 1
    finally:
        for left in (out, kept, model):
            shutil.rmtree(left, ignore_errors=True)
        if not options.keep:
            shutil.rmtree(folder if options.work_dir else root, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
