"""Runs in vLLM's environment: log-probabilities of every token behind every prefix.

python run_vllm.py MODEL IDS.json OUT.json VOCABULARY
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    from vllm import LLM, SamplingParams

    model, ids_file, out, vocabulary = sys.argv[1:]
    ids = json.loads(Path(ids_file).read_text())
    length = len(ids) + 1
    llm = LLM(model, dtype="float32", max_model_len=length, max_logprobs=int(vocabulary), enforce_eager=True)
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=int(vocabulary), detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": ids}], wanted)
    rows = [{token: entry.logprob for token, entry in row.items()} for row in answer.prompt_logprobs[1:]]
    Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
