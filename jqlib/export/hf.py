"""The rotated FP model as a Hugging Face checkpoint, and the writing that other forms share."""

from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from jqlib import pipeline
from jqlib.config import Config
from jqlib.model.families import family_of, rejoined
from jqlib.quant.keep import unrounded
from jqlib.recipes import Recipe
from jqlib.transform.build import build


def write(config: Config, recipe: Recipe, tokenizer, to: Path) -> None:
    """R1, R2, gains and scales merged; what would run online is left out, and the model computes what FP does."""
    model = pipeline.load_model(config)
    merged = {name: transform.split()[0] for name, transform in pipeline.transforms(config, recipe).items()}
    build(model, {name: transform.to(model.device) for name, transform in merged.items()})
    write_folder(model, checkpoint_of(model), {}, tokenizer, to)


def checkpoint_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors but for rounded weights and what stands at the sites; a tied head comes once, as the embedding."""
    tied = f"{family_of(model).head}.weight" if model.config.tie_word_embeddings else None
    return {name: tensor for name, tensor in unrounded(model).items() if name != tied}


def write_folder(
    model: nn.Module, tensors: dict[str, Tensor], more: dict, tokenizer, to: Path, kind: type | None = None
) -> None:  # fmt: skip
    """A checkpoint of these tensors; ``more``: what its config, of this ``kind`` (the model's), says besides."""
    shape = (kind or type(model.config)).from_dict(model.config.to_dict())
    shape.architectures, shape.dtype = [type(model).__name__], model.dtype
    for name, value in more.items():
        setattr(shape, name, value)
    shape.save_pretrained(to)
    model.generation_config.save_pretrained(to)
    tokenizer.save_pretrained(to)
    tensors = {name: tensor.contiguous() for name, tensor in rejoined(model, tensors).items()}
    save_torch_state_dict(tensors, to, metadata={"format": "pt"})
