"""By hand: a folder of the form jointquant, loaded by transformers, beside the model that was measured.

    python tests/export/layer_by_layer.py FOLDER

Each layer is fed what ours is fed, so a tie of rounding is not passed on: what is left is float32's own rounding, and
the tokens within one layer at which a number fell on the other side of a tie. Behind it the perplexities: theirs, ours,
and ours with the embedding moved by a millionth, which says how far ties alone take it.
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from jqlib import pipeline
from jqlib.config import Config
from jqlib.model.evaluate import evaluate_windows
from jqlib.model.walk import walk
from jqlib.product import fast_float32

TIE = 1e-4  # a token that differs by more has a number on the other side of a tie


@torch.inference_mode()
def apart(ours: nn.Module, theirs: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """By layer, of each token: the length of the difference of its outputs, as a share of the output's."""
    found = {}
    for step in walk(ours, windows, "layers"):
        layer, rows = theirs.get_submodule(step.name), []
        for part in step.parts():
            mine, other = step.run(step.hidden[part]), layer(step.hidden[part], **step.arguments)
            rows.append(((other - mine).norm(dim=-1) / mine.norm(dim=-1)).flatten())
        found[step.name] = torch.cat(rows)
    return found


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    with fast_float32(windows.device):  # by the library that ours are multiplied by: another one's ties fall otherwise
        nll = [cross_entropy(model(window[None]).logits[0, :-1], window[1:]).item() for window in windows]
    return math.exp(sum(nll) / len(nll))


@torch.no_grad()
def moved(model: nn.Module, windows, seed: int) -> float:
    """Perplexity when each number of the embedding is moved by a millionth of it."""
    weight = model.get_input_embeddings().weight
    kept = weight.clone()
    weight *= 1 + 1e-6 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    found = float(evaluate_windows(model, windows))
    weight.copy_(kept)
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    config = Config(**json.loads((folder / "jointquant.json").read_text())["config"])
    ours = pipeline.quantised(config, pipeline.recipe_of(config), config.w_bits, config.a_bits)
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=ours.dtype).eval()
    windows = pipeline.evaluation_windows(config)
    for name, tokens in apart(ours, theirs, windows.ids).items():
        ties = tokens > TIE
        print(f"{name}: median {tokens.median():.1e}, largest without ties {tokens[~ties].max():.1e}, "
              f"{ties.sum()} of {len(tokens)} tokens with a tie")  # fmt: skip
    print(f"perplexity: ours {evaluate_windows(ours, windows):.6f}, loaded {perplexity(theirs, windows.ids):.6f}")
    print("ours, embedding moved by 1e-6:", ", ".join(f"{moved(ours, windows, seed):.6f}" for seed in range(3)))
