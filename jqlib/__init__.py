"""JointQuant: W4A4 for Llama-type models.

Rotations and scales found for all layers together, GPTQ, a short tuning by the FP model's predictions.
"""

from jqlib.activations import collect_activations
from jqlib.data import get_calibration_data
from jqlib.evaluate import evaluate_perplexity
from jqlib.joint import train_r1_joint, train_r2_independent
from jqlib.models import get_model, get_tokenizer, site_targets
from jqlib.quantize import quantize_model
from jqlib.rotation import fuse_layer_norms, rotate_model
from jqlib.smooth import compute_simple_smooth_scale

__all__ = [
    "collect_activations",
    "compute_simple_smooth_scale",
    "evaluate_perplexity",
    "fuse_layer_norms",
    "get_calibration_data",
    "get_model",
    "get_tokenizer",
    "quantize_model",
    "rotate_model",
    "site_targets",
    "train_r1_joint",
    "train_r2_independent",
]
