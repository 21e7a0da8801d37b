"""JointQuant: W4A4 for Llama-type models.

Rotations and scales found for all layers together, GPTQ, a short tuning by the FP model's predictions.
"""

from jqlib.learn.activations import collect_activations
from jqlib.learn.rotations import train_r1_joint, train_r2_independent
from jqlib.learn.smooth import compute_simple_smooth_scale
from jqlib.model.data import get_calibration_data
from jqlib.model.evaluate import evaluate_perplexity
from jqlib.model.families import site_targets
from jqlib.model.load import get_model, get_tokenizer
from jqlib.quant.keep import load_model, save_model
from jqlib.quant.quantize import quantize_model
from jqlib.transform.build import fuse_layer_norms, rotate_model

__all__ = [
    "collect_activations",
    "compute_simple_smooth_scale",
    "evaluate_perplexity",
    "fuse_layer_norms",
    "get_calibration_data",
    "get_model",
    "get_tokenizer",
    "load_model",
    "quantize_model",
    "rotate_model",
    "save_model",
    "site_targets",
    "train_r1_joint",
    "train_r2_independent",
]
