"""Run by test_llama_1b_shape.py in a process of its own: the whole way of a model, and its peak memory as JSON."""

import json
import math
import resource
import sys

import torch

from jqlib import (
    collect_activations,
    evaluate_perplexity,
    fuse_layer_norms,
    get_calibration_data,
    get_model,
    get_tokenizer,
    quantize_model,
    rotate_model,
    site_targets,
    train_r1_joint,
    train_r2_independent,
)
from jqlib.transform.orthogonal import orthogonality_error


def main(folder: str, text: str) -> None:
    model, tokenizer = get_model(folder), get_tokenizer(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    calibration = get_calibration_data(tokenizer, nsamples=2, seqlen=128, dataset=text)
    acts = collect_activations(model, calibration, site_targets(model, "qkv", "ug", "o"))
    r2_acts = {name: acts.pop(name) for name in site_targets(model, "o")}
    R1 = train_r1_joint(acts, 2048, 2, max_steps=2)
    R2 = train_r2_independent(r2_acts, 2048, 32, 8, max_steps=2)
    del acts, r2_acts

    def perplexity():
        return evaluate_perplexity(model, tokenizer, dataset=text, seqlen=128, max_windows=1)

    before = perplexity()
    fuse_layer_norms(model)
    rotate_model(model, R1, R2)
    rotated = perplexity()
    quantize_model(model)
    print(json.dumps({
        "nll": [math.log(p) for p in (before, rotated, perplexity())],
        "R1": list(R1.shape),
        "R2": [list(heads.shape) for heads in R2.values()],
        "orthogonality": max(map(orthogonality_error, [R1, *R2.values()])),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
