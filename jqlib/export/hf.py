"""The rotated FP model as a Hugging Face checkpoint, and the writing that other forms share."""

from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from jqlib import pipeline
from jqlib.config import Config
from jqlib.model.families import family_of, rejoined
from jqlib.recipes import Recipe
from jqlib.transform.build import build


def write(config: Config, recipe: Recipe, tokenizer, to: Path) -> None:
    """R1, R2, gains and scales merged; what would run online is left out, and the model computes what FP does."""
    model = pipeline.load_model(config)
    merged = {name: transform.split()[0] for name, transform in pipeline.transforms(config, recipe).items()}
    build(model, {name: transform.to(model.device) for name, transform in merged.items()})
    write_folder(model, model.state_dict(), {}, tokenizer, to)


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
    tied = {f"{family_of(model).head}.weight"} if shape.tie_word_embeddings else set()
    tensors = {name: tensor.contiguous() for name, tensor in rejoined(model, tensors).items() if name not in tied}
    save_torch_state_dict(tensors, to, metadata={"format": "pt"})
