"""A model quantised in place: weights by RTN or GPTQ, activations by hooks where a site's input is made, the KV cache.

Matmuls stay in floating point; embeddings and the head are not quantised.
"""

from functools import partial

from torch import Tensor, nn
from tqdm import tqdm

from jqlib.gptq import quantize_weights_gptq
from jqlib.hadamard import factors
from jqlib.kv_cache import quantize_kv_cache
from jqlib.models import begin, done, family_of, head_dim_of, layers_of, on_input, site_targets, sites_of
from jqlib.quant import OFF, check_bits, quantize_activation, quantize_weight

WEIGHTS = ("rtn", "gptq")
GPTQ_INPUTS = ("fp", "quantised", "corrected")

Clips = dict[str, float | Tensor]  # by a site's first reader


def quantize_model(
    model: nn.Module,
    w_bits: int = 4,
    a_bits: int = 4,
    w_groupsize: int = 128,
    *,
    kv_bits: int = OFF,
    weights: str = "rtn",
    calib_data: Tensor | None = None,
    gptq_inputs: str = "fp",
    a_clip: float | Clips = 1.0,
    o_per_head: bool = False,
    a_groupsize: int | None = None,
) -> None:
    """Quantise all linears of the decoder layers and the activations they read, in place. 16 bits: left alone.

    ``weights``: ``"rtn"`` rounds each weight to its nearest; ``"gptq"`` needs ``calib_data``, token windows
    (windows, seqlen), and makes later weights of a row answer for the rounding of earlier ones (`jqlib.gptq`).
    ``kv_bits``: keys (behind R3) and values (`jqlib.kv_cache`).
    ``gptq_inputs="quantised"``: GPTQ answers for inputs rounded to ``a_bits`` too, its own layer's and those before it;
    ``"corrected"``: and every weight aims at what it would have put out without any rounding (`jqlib.gptq.corrected`).
    ``a_clip`` shrinks every token's range, at all sites or by a site's first reader (0-dim tensors are read at every
    call: `tune` changes them). A token's input has one grid, or one for each ``a_groupsize`` channels of it;
    ``o_per_head`` gives o_proj's a grid a head.

    Raises ValueError for bits outside 2..16, a group size below 1, an ``a_groupsize`` that does not divide a site's
    channels, a clip outside (0, 1] or GPTQ without calibration data; RuntimeError for a model quantised already.
    """
    clips = a_clip if isinstance(a_clip, dict) else dict.fromkeys(site_targets(model), a_clip)
    check_bits(w_bits=w_bits, a_bits=a_bits, kv_bits=kv_bits)
    _check(model, w_groupsize, a_groupsize, clips, weights, gptq_inputs)
    gptq = weights == "gptq" and w_bits < OFF
    if gptq and calib_data is None:
        raise ValueError("weights='gptq' needs calib_data: token windows, as get_calibration_data gives them")
    begin(model, "quantised")
    if kv_bits < OFF:
        factors(head_dim_of(model))  # raises where no Hadamard matrix has that size
    round_inputs = partial(_round_inputs, model, a_bits, clips, o_per_head, a_groupsize)
    inputs_first = gptq and gptq_inputs != "fp"
    if gptq:
        quantize_weights_gptq(
            model, calib_data, w_bits, w_groupsize,
            before=round_inputs if inputs_first else None, correct=gptq_inputs == "corrected",
        )  # fmt: skip
    elif w_bits < OFF:
        _round_to_nearest(model, w_bits, w_groupsize)
    if not inputs_first:
        for layer, _ in layers_of(model):
            round_inputs(layer)
    if kv_bits < OFF:
        quantize_kv_cache(model, kv_bits)
    done(model).add("quantised")


def _check(model, w_groupsize: int, a_groupsize: int | None, clips: Clips, weights: str, gptq_inputs: str) -> None:
    if w_groupsize < 1:
        raise ValueError(f"w_groupsize={w_groupsize}: a group holds at least 1 weight (128 is usual)")
    widths = {name: model.get_submodule(name).in_features for name in site_targets(model)}
    for name, width in widths.items():
        if a_groupsize is not None and (a_groupsize < 1 or width % a_groupsize):
            raise ValueError(f"a_groupsize={a_groupsize} does not divide the {width} channels of {name}")
    if missing := [name for name in widths if name not in clips]:
        raise ValueError(f"a_clip has no entry for {missing[0]}: give one number, or one for every site's first reader")
    if wrong := [clip for clip in clips.values() if not 0 < clip <= 1]:
        raise ValueError(f"a_clip={wrong[0]}: a clip ratio lies in (0, 1]")
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is unknown; there are {', '.join(WEIGHTS)}")
    if gptq_inputs not in GPTQ_INPUTS:
        raise ValueError(f"gptq_inputs={gptq_inputs!r} is unknown; there are {', '.join(GPTQ_INPUTS)}")


def _round_to_nearest(model: nn.Module, bits: int, groupsize: int) -> None:
    for layer, site in tqdm(sites_of(model).values(), "rounding weights", unit="site"):
        for reader in site.readers:
            weight = model.get_submodule(f"{layer}.{reader}").weight
            weight.data = quantize_weight(weight, bits, groupsize).to(weight.dtype)


def _round_inputs(
    model: nn.Module, bits: int, clips: Clips, o_per_head: bool, a_groupsize: int | None, layer: str
) -> None:
    """From now on the inputs of one layer's sites are rounded."""
    for site in family_of(model).sites if bits < OFF else ():
        groupsize = head_dim_of(model) if site.name == "o" and o_per_head else a_groupsize
        clip = clips[f"{layer}.{site.readers[0]}"]
        on_input(model, layer, site, partial(quantize_activation, bits=bits, clip=clip, groupsize=groupsize))
