"""A model quantised in place: weights by RTN or GPTQ, activations by grids where a site's input is made, the KV cache.

Matmuls stay in floating point; embeddings and the head are not quantised.
"""

from torch import Tensor, nn
from tqdm import tqdm

from jqlib.choices import GptqInputs, Weights, check_bits, check_choice
from jqlib.model.families import Place, head_dim_of, sites_of
from jqlib.model.stream import each_layer
from jqlib.quant.gptq import quantize_weights_gptq
from jqlib.quant.kv_cache import quantize_kv_cache
from jqlib.quant.packed import set_weight
from jqlib.transform.build import begin, done
from jqlib.transform.grids import OFF, round_to_nearest
from jqlib.transform.hadamard import block_order
from jqlib.transform.install import install
from jqlib.transform.transform import Grid, Transform


def quantize_model(
    model: nn.Module,
    w_bits: int = 4,
    a_bits: int = 4,
    w_groupsize: int = 128,
    *,
    kv_bits: int = OFF,
    weights: Weights = "rtn",
    calib_data: Tensor | None = None,
    gptq_inputs: GptqInputs = "fp",
    a_clip: float | dict[str, float] = 1.0,
    o_per_head: bool = False,
    a_groupsize: int | None = None,
) -> None:
    """Quantise all linears of the decoder layers and the activations they read, in place. 16 bits: left alone.

    ``weights``: ``"rtn"`` rounds each weight to its nearest; ``"gptq"`` needs ``calib_data``, token windows
    (windows, seqlen), and makes later weights of a row answer for the rounding of earlier ones (`jqlib.quant.gptq`).
    ``kv_bits``: keys (behind R3) and values (`jqlib.quant.kv_cache`).
    ``gptq_inputs="quantised"``: GPTQ answers for inputs rounded to ``a_bits`` too, its own layer's and those before it;
    ``"corrected"``: and every weight aims at what it would have put out without any rounding (`gptq.corrected`).
    ``a_clip`` shrinks every token's range, at all sites or by site. A token's input has one grid, or one for each
    ``a_groupsize`` channels of it; ``o_per_head`` gives o_proj's one grid per head.

    Raises ValueError for bits outside 2..16, a group size below 1, an ``a_groupsize`` that does not divide a site's
    channels, a clip outside (0, 1] or GPTQ without calibration data; RuntimeError for a model quantised already.
    """
    sites = sites_of(model)
    clips = a_clip if isinstance(a_clip, dict) else dict.fromkeys(sites, a_clip)
    check_bits(w_bits, a_bits, kv_bits)
    check_choice("weights", weights, Weights)
    check_choice("gptq_inputs", gptq_inputs, GptqInputs)
    _check_groups(sites, w_groupsize, a_groupsize)
    _check_clips(sites, clips)
    if weights == "gptq" and w_bits < OFF and calib_data is None:
        raise ValueError("weights='gptq' needs calib_data: token windows, as get_calibration_data gives them")
    d = head_dim_of(model)
    if kv_bits < OFF:
        block_order(d)  # raises if there is no Hadamard matrix for R3
    begin(model, "quantised")
    done(model).add("quantised")  # if it fails half-way, a second call must not round what is rounded
    sizes = {name: d if p.kind == "o" and o_per_head else a_groupsize for name, p in sites.items()}
    grids = {name: Grid(a_bits, clips[name], sizes[name]) for name in sites}
    round_weights(model, w_bits, w_groupsize, weights, calib_data, gptq_inputs, grids)
    round_inputs(model, grids)
    if kv_bits < OFF:
        quantize_kv_cache(model, kv_bits)


def round_weights(
    model: nn.Module, bits: int, groupsize: int, weights: Weights, calib_data: Tensor | None = None,
    gptq_inputs: GptqInputs = "fp", grids: dict[str, Grid] | None = None,
) -> None:  # fmt: skip
    """The weights' part of `quantize_model`. Grids are left at the sites if GPTQ's inputs are rounded by them."""
    if bits < OFF and weights == "gptq":
        before = None if gptq_inputs == "fp" else lambda place: set_grid(model, place, grids[place.name])
        quantize_weights_gptq(model, calib_data, bits, groupsize, before=before, correct=gptq_inputs == "corrected")
    elif bits < OFF:
        layers = model.config.num_hidden_layers
        for places in tqdm(each_layer(model), "rounding weights", layers, unit="layer"):
            for linear in (linear for place in places for linear in place.linears.values()):
                set_weight(linear, *round_to_nearest(linear.weight.data, bits, groupsize), bits, groupsize)


def round_inputs(model: nn.Module, grids: dict[str, Grid]) -> None:
    """Every site's input is rounded from now on."""
    for name, place in sites_of(model).items():
        set_grid(model, place, grids[name])


def set_grid(model: nn.Module, place: Place, grid: Grid) -> None:
    """A site's input is rounded from now on, behind the transform that stands there, if any."""
    if grid.bits == OFF:
        return
    if not hasattr(place.host, "transform"):
        install(model, place, Transform())
    place.host.transform.grid = grid.to(model.device)


def _check_groups(sites: dict[str, Place], w_groupsize: int, a_groupsize: int | None) -> None:
    if not isinstance(w_groupsize, int) or w_groupsize < 1:
        raise ValueError(f"w_groupsize={w_groupsize}: a group holds at least 1 weight (128 is usual)")
    for name, place in sites.items():
        if a_groupsize is not None and (a_groupsize < 1 or place.width % a_groupsize):
            raise ValueError(f"a_groupsize={a_groupsize} does not divide the {place.width} channels of {name}")


def _check_clips(sites: dict[str, Place], clips: dict[str, float]) -> None:
    if missing := [name for name in sites if name not in clips]:
        raise ValueError(f"a_clip has no entry for {missing[0]}: give one number, or one for every site")
    if wrong := [clip for clip in clips.values() if not 0 < clip <= 1]:
        raise ValueError(f"a_clip={wrong[0]}: a clip ratio lies in (0, 1]")
