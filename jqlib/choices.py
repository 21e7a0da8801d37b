"""Every choice by name, once: settings, flags and dispatch read these."""

from typing import Literal, get_args

Solver = Literal["mm", "sgd", "adam", "cayley", "greedy"]
Objective = Literal["whip", "range", "kurtosis", "lp", "quant_error"]
InitMode = Literal["hadamard", "random", "identity"]
Measure = Literal["max", "l2"]
Weights = Literal["rtn", "gptq"]
GptqInputs = Literal["fp", "quantised", "corrected"]
Split = Literal["test", "validation"]
Draw = Literal["spread", "first"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]


FINEST = 12  # bits of weights that are rounded: with more, float16 has too few numbers for their scales


def check_bits(w_bits: int, a_bits: int, kv_bits: int) -> None:
    """Raise ValueError unless each is a whole number from 2 to 16, and weights' not 13 to 15: their errors would be
    larger than those of 12."""
    for name, value in {"w_bits": w_bits, "a_bits": a_bits, "kv_bits": kv_bits}.items():
        if not isinstance(value, int) or not 2 <= value <= 16:
            raise ValueError(f"{name}={value}: bits are whole numbers from 2 to 16, and 16 means not quantised")
    if FINEST < w_bits < 16:
        raise ValueError(f"w_bits={w_bits}: weights have 2 to {FINEST} bits, or 16, which leaves them alone")


def check_choice(name: str, value: object, allowed) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``: a Literal type, or the names themselves."""
    names = get_args(allowed) or tuple(allowed)
    if value not in names:
        raise ValueError(f"{name}={value!r} is unknown; there are {', '.join(map(str, names))}")
