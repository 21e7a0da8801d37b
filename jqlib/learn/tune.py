"""After the weights are rounded: the scales of their groups, the norms' gains and the clips, tuned end to end.

The integer codes stay as they are; what moves is stored beside them anyway. EfficientQAT's second phase (Chen et al.
2024, §3.3), here with the activations' rounding in the loop, norms and clips besides, and KL to the FP model's
predictions for a loss. Scales end as float16 numbers again.
"""

from torch import Tensor, nn

from jqlib.learn.lessons import Lessons
from jqlib.learn.recompute import recomputing
from jqlib.learn.rounded import RATES, learnable_weights
from jqlib.learn.steps import Steps, minimise_by_steps
from jqlib.model.families import family_of, norms_of, sites_of
from jqlib.precision import products_in
from jqlib.quant.packed import rounded_linears
from jqlib.transform.build import done
from jqlib.transform.install import standing_grids


def tune(model: nn.Module, lessons: Lessons, steps: Steps = Steps(), *, clips: bool = True) -> None:
    """Tune a ``model`` of rounded weights in place, towards the FP model's predictions (`lessons.teach`).

    ``clips=False``: these stay as they are.

    Raises RuntimeError when the model is not quantised, FloatingPointError if the loss is not finite.
    """
    if "quantised" not in done(model):
        raise RuntimeError("tune needs a model whose weights are rounded: call quantize_model(model) before it")
    norms = norms_of(model) | {"final": model.get_submodule(family_of(model).final_norm)}
    grids = standing_grids(sites_of(model).values()) if clips else {}
    lessons = lessons.to(model.device)

    def loss(pieces: Tensor) -> Tensor:
        with products_in(steps.dtype, model.device):
            return lessons.loss(model, pieces)

    with learnable_weights(rounded_linears(model), norms, grids) as knobs, recomputing(model, steps.together):
        minimise_by_steps(knobs, loss, lessons.ids, RATES, steps, "tuning")
