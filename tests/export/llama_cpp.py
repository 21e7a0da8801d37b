"""By hand: llama.cpp's perplexity of an exported GGUF on our evaluation windows, beside what the card says.

python tests/export/llama_cpp.py FOLDER
"""

import json
import math
import sys
from pathlib import Path

from llama_library import predicted

from jqlib import pipeline
from jqlib.config import Config
from jqlib.model.load import load_config

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    about = json.loads((folder / "jointquant.json").read_text())
    config, rows = Config(**about["config"]), about["rows"]
    windows = pipeline.evaluation_windows(config)
    found = predicted(str(folder / "model.gguf"), windows.ids.tolist(), load_config(config.model).vocab_size)
    nll = [nats for nats, _ in found]
    theirs = math.exp(sum(nll) / len(nll))
    for name, row in rows.items():
        print(f"{name}: {row['ppl']:.4f}; llama.cpp {theirs:.4f}, {theirs / row['ppl'] - 1:+.2%}")
