"""llama.cpp's C functions, which the wheel's Python does not hand out: tokens of texts, predictions of prompts.

Parameters are structs by value: a buffer that is larger than they are serves for one, and a context's first field is
its size. `tests/test_export_gguf.py` calls this in a process of its own.
"""

import ctypes
from pathlib import Path

import numpy as np
import xllamacpp

I32, POINTER, ROOM = ctypes.c_int32, ctypes.c_void_p, 2**16
POINTERS = ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")


class Params(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_char * 1024)]


class Batch(ctypes.Structure):
    _fields_ = [("n_tokens", I32), *((name, POINTER) for name in POINTERS)]


def loaded(path: str):
    """The library, and a model in it."""
    lib = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    tokenize = [POINTER, ctypes.c_char_p, I32, POINTER, I32, ctypes.c_bool, ctypes.c_bool]
    for name, result, arguments in (
        ("llama_model_default_params", Params, []), ("llama_context_default_params", Params, []),
        ("llama_model_load_from_file", POINTER, [ctypes.c_char_p, Params]),
        ("llama_init_from_model", POINTER, [POINTER, Params]), ("llama_get_memory", POINTER, [POINTER]),
        ("llama_memory_clear", None, [POINTER, ctypes.c_bool]), ("llama_batch_init", Batch, [I32, I32, I32]),
        ("llama_decode", I32, [POINTER, Batch]), ("llama_get_logits", POINTER, [POINTER]),
        ("llama_model_get_vocab", POINTER, [POINTER]), ("llama_tokenize", I32, tokenize),
    ):  # fmt: skip
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib, lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())


def tokens_of(path: str, texts: list[str]) -> list[list[int]]:
    """Ids, with BOS where the file says so; special tokens in a text are found."""
    lib, model = loaded(path)
    vocabulary, room = lib.llama_model_get_vocab(model), (I32 * ROOM)()
    return [room[: lib.llama_tokenize(vocabulary, text, len(text), room, ROOM, True, True)]
            for text in map(str.encode, texts)]  # fmt: skip


def predicted(path: str, windows: list[list[int]], vocabulary: int) -> list[tuple[float, list[int]]]:
    """Of each window: mean nats per token, and the likeliest token at each place but the last."""
    lib, model = loaded(path)
    params, length = lib.llama_context_default_params(), len(windows[0])
    sizes = (ctypes.c_uint32 * 3).from_buffer(params)  # n_ctx, n_batch, n_ubatch
    sizes[0], sizes[1], sizes[2] = length, length, min(512, length)
    context = lib.llama_init_from_model(model, params)
    batch, found = lib.llama_batch_init(length, 0, 1), []
    batch.n_tokens = length
    for window in windows:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        for i, token in enumerate(window):
            (I32 * length).from_address(batch.token)[i] = token
            (I32 * length).from_address(batch.pos)[i] = i
            (I32 * length).from_address(batch.n_seq_id)[i] = 1
            (I32 * 1).from_address((POINTER * length).from_address(batch.seq_id)[i])[0] = 0
            (ctypes.c_int8 * length).from_address(batch.logits)[i] = 1
        if lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode failed on {path}")
        there = (ctypes.c_float * (length * vocabulary)).from_address(lib.llama_get_logits(context))
        logits = np.ctypeslib.as_array(there).reshape(length, vocabulary)[:-1].astype(float)
        found.append((_nll(logits, window[1:]), logits.argmax(-1).tolist()))
    return found


def _nll(logits: np.ndarray, labels: list[int]) -> float:
    top = logits.max(-1)
    return float(np.mean(np.log(np.exp(logits - top[:, None]).sum(-1)) + top - logits[np.arange(len(labels)), labels]))
