"""A model quantised in place: weights by RTN or GPTQ, activations by hooks where a site's input is made, the KV cache.

Matmuls stay in floating point; embeddings and the head are not quantised.
"""

from functools import partial

from torch import Tensor, nn
from tqdm import tqdm

from jqlib.gptq import quantize_weights_gptq
from jqlib.hadamard import factors
from jqlib.kv_cache import quantize_kv_cache
from jqlib.models import begin, done, head_dim_of, on_input, sites_of
from jqlib.quant import OFF, check_bits, quantize_activation, quantize_weight

WEIGHTS = ("rtn", "gptq")


def quantize_model(
    model: nn.Module,
    w_bits: int = 4,
    a_bits: int = 4,
    w_groupsize: int = 128,
    *,
    kv_bits: int = OFF,
    weights: str = "rtn",
    calib_data: Tensor | None = None,
    a_clip: float = 1.0,
    o_per_head: bool = False,
) -> None:
    """Quantise all linears of the decoder layers and the activations they read, in place. 16 bits: left alone.

    ``weights``: ``"rtn"`` rounds each weight to its nearest; ``"gptq"`` needs ``calib_data``, token windows
    (windows, seqlen), and makes later weights of a row answer for the rounding of earlier ones (`jqlib.gptq`).
    ``kv_bits``: keys (behind R3) and values (`jqlib.kv_cache`).
    ``a_clip`` shrinks every token's range; ``o_per_head`` gives o_proj's input a grid a head.

    Raises ValueError for bits outside 2..16, a group size below 1, a clip outside (0, 1] or GPTQ without
    calibration data; RuntimeError for a model quantised already.
    """
    check_bits(w_bits=w_bits, a_bits=a_bits, kv_bits=kv_bits)
    if w_groupsize < 1:
        raise ValueError(f"w_groupsize={w_groupsize}: a group holds at least 1 weight (128 is usual)")
    if not 0 < a_clip <= 1:
        raise ValueError(f"a_clip={a_clip}: a clip ratio lies in (0, 1]")
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is unknown; there are {', '.join(WEIGHTS)}")
    if weights == "gptq" and w_bits < OFF and calib_data is None:
        raise ValueError("weights='gptq' needs calib_data: token windows, as get_calibration_data gives them")
    begin(model, "quantised")
    if kv_bits < OFF:
        factors(head_dim_of(model))  # raises where no Hadamard matrix has that size
    if w_bits < OFF and weights == "gptq":
        quantize_weights_gptq(model, calib_data, w_bits, w_groupsize)
    elif w_bits < OFF:
        for layer, site in tqdm(sites_of(model), "rounding weights", unit="site"):
            for reader in site.readers:
                weight = model.get_submodule(f"{layer}.{reader}").weight
                weight.data = quantize_weight(weight, w_bits, w_groupsize).to(weight.dtype)
    if a_bits < OFF:
        for layer, site in sites_of(model):
            groupsize = head_dim_of(model) if site.name == "o" and o_per_head else None
            on_input(model, layer, site, partial(quantize_activation, bits=a_bits, clip=a_clip, groupsize=groupsize))
    if kv_bits < OFF:
        quantize_kv_cache(model, kv_bits)
    done(model).add("quantised")
