"""By hand: llama.cpp's perplexity of an exported GGUF on our evaluation windows, beside what the card says.

    python tests/export/llama_cpp.py FOLDER

The wheel's Python has no prompt logits, so its C functions are called. Their parameters are structs by value: a buffer
that is larger than they are serves for one, and a context's first field is its size.
"""

import ctypes
import json
import math
import sys
from pathlib import Path

import torch
import xllamacpp

from jqlib import pipeline
from jqlib.config import Config
from jqlib.model.load import load_config

I32, POINTER = ctypes.c_int32, ctypes.c_void_p
POINTERS = ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")


class Params(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_char * 1024)]


class Batch(ctypes.Structure):
    _fields_ = [("n_tokens", I32), *((name, POINTER) for name in POINTERS)]


def windows_nll(path: Path, windows: torch.Tensor, vocabulary: int) -> list[float]:
    """Mean nats per token of each window."""
    lib = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    for name, result, arguments in (
        ("llama_model_default_params", Params, []), ("llama_context_default_params", Params, []),
        ("llama_model_load_from_file", POINTER, [ctypes.c_char_p, Params]),
        ("llama_init_from_model", POINTER, [POINTER, Params]), ("llama_get_memory", POINTER, [POINTER]),
        ("llama_memory_clear", None, [POINTER, ctypes.c_bool]), ("llama_batch_init", Batch, [I32, I32, I32]),
        ("llama_decode", I32, [POINTER, Batch]), ("llama_get_logits", POINTER, [POINTER]),
    ):  # fmt: skip
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    params, length = lib.llama_context_default_params(), windows.shape[1]
    sizes = (ctypes.c_uint32 * 3).from_buffer(params)  # n_ctx, n_batch, n_ubatch
    sizes[0], sizes[1], sizes[2] = length, length, min(512, length)
    context = lib.llama_init_from_model(model, params)
    batch, found = lib.llama_batch_init(length, 0, 1), []
    batch.n_tokens = length
    for window in windows.tolist():
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        for i, token in enumerate(window):
            (I32 * length).from_address(batch.token)[i] = token
            (I32 * length).from_address(batch.pos)[i] = i
            (I32 * length).from_address(batch.n_seq_id)[i] = 1
            (I32 * 1).from_address((POINTER * length).from_address(batch.seq_id)[i])[0] = 0
            (ctypes.c_int8 * length).from_address(batch.logits)[i] = 1
        if lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode failed on {path}")
        logits = torch.frombuffer((ctypes.c_float * (length * vocabulary)).from_address(lib.llama_get_logits(context)),
                                  dtype=torch.float32).view(length, vocabulary)  # fmt: skip
        found.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(window[1:])).item())
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    about = json.loads((folder / "jointquant.json").read_text())
    config, rows = Config(**about["config"]), about["rows"]
    windows = pipeline.evaluation_windows(config)
    nll = windows_nll(folder / "model.gguf", windows.ids, load_config(config.model).vocab_size)
    theirs = math.exp(sum(nll) / len(nll))
    for name, row in rows.items():
        print(f"{name}: {row['ppl']:.4f}; llama.cpp {theirs:.4f}, {theirs / row['ppl'] - 1:+.2%}")
