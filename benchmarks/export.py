"""Time `btx edit`, `btx export` and `btx extract` beside `cp -r` of their results, on a merge of made-up checkpoints.

The edit drops the last expert, once with shared weights as if merged without it, from all sources, and once with kept.

    python benchmarks/export.py --rounds 4

Runs, measures and reports as benchmarks/merge.py does, whose options it has (of --contenders, btx and cp; no --memory,
no --latency).
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import bench
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
    print(bench.listed(facts), end="")
    try:
        sources = make_sources(folder, shape, options.dtype, options.experts, results=2)
        subprocess.run([btx, "merge", *source_options(sources), "--overwrite", "-q", "-o", str(model)], check=True)
        last, names = sources[-1].name, ["seed", *(source.name for source in sources[1:])]
        places = zip(names, sources, strict=True)
        moved = [word for name, source in places for word in ("--source", f"{name}={source}")]
        to_out, quoted = ["-o", str(out)], [shlex.quote(str(path)) for path in (kept, out)]
        commands = {
            "edit --shared update": ["edit", str(model), "--drop", last, "--shared", "update", *moved, *to_out],
            "edit --shared keep": ["edit", str(model), "--drop", last, "--shared", "keep", *to_out],
            "export": ["export", str(model), str(out)],
            "extract": ["extract", str(model), last, *to_out],
        }
        for name, words in commands.items():
            if name == "export" and not options.keep:  # room for the results; from here on nobody reads them
                shutil.rmtree(sources[0].parent)
            merge.CONTENDERS |= {"btx": f"btx {name}", "synced": "cp -r, synced"}
            contenders = [
                Contender("btx", [btx, *words, "--quiet"], [model, *(sources if "update" in name else [])]),
                Contender("cp", [programs(options)["cp"], "-r", str(kept), str(out)], [kept]),
                Contender("synced", ["sh", "-c", f"cp -r {quoted[0]} {quoted[1]} && sync -f {quoted[1]}"], [kept]),
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
