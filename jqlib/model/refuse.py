"""A model that a Hugging Face checkpoint can't hold as it stands does not pretend to be saved."""

from functools import partial

from torch import nn


def refuse_to_save(model: nn.Module, why: str) -> None:
    """From now on the model's `save_pretrained` raises RuntimeError, and says ``why``."""
    model.save_pretrained = partial(_refuse, why)


def _refuse(why: str, *args, **kwargs):
    raise RuntimeError(why)
