"""What can differ on a GPU: every recipe from end to end beside the CPU's, the GPU's own ways, models moved to it."""

import logging
from dataclasses import replace

import pytest
import torch

from jqlib import pipeline
from jqlib.config import make_config
from jqlib.learn.objectives import OBJECTIVES
from jqlib.learn.rotations import train_r1_joint
from jqlib.learn.steps import Steps, minimise_by_steps
from jqlib.quant.gptq import gptq
from jqlib.quant.keep import load_model, save_model
from jqlib.quant.quantize import quantize_model
from jqlib.recipes import RECIPES
from jqlib.replay import Replayed
from jqlib.transform.orthogonal import by_svd, polar
from jqlib.transform.transform import Transform

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@pytest.fixture
def config(tmp_path, tiny_model, tiny_tokenizer):
    tiny_model(layers=3).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    names = {"model": "model", "calib_dataset": "text.txt", "eval_dataset": "text.txt", "output_dir": "out"}
    small = {"profile": "quick", "nsamples": 4, "seqlen": 64, "max_tokens": 128, "eval_seqlen": 64, "eval_windows": 4,
             "refine_steps": 3, "step_tokens": 128, "compute_dtype": "float32"}  # fmt: skip
    return make_config({name: str(tmp_path / file) for name, file in names.items()} | small)


@pytest.mark.parametrize("name", [None, *RECIPES])
def test_a_recipe_gives_on_a_gpu_what_it_gives_on_a_processor(config, name):
    recipe, bits = (RECIPES[name], 4) if name else (None, 16)
    there, here = (pipeline.evaluate(replace(config, device=d, kv_bits=8), recipe, bits, bits) for d in ("cuda", "cpu"))
    learns = recipe and (recipe.r1 == "output" or recipe.refine or recipe.layerwise or recipe.tune)
    near = 0.1 if learns else 0.01 if recipe else 1e-4
    assert there["ppl"] == pytest.approx(here["ppl"], rel=near)


def test_the_steps_of_all_stages_are_replayed(config, caplog):
    with caplog.at_level(logging.INFO, "jqlib.replay"):
        pipeline.evaluate(replace(config, device="cuda", compute_dtype="bfloat16"), RECIPES["jointquant-best"], 4, 4)
    assert caplog.messages == []


def test_replayed_steps_end_where_written_ones_do(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, 8, generator=generator).cuda() for _ in range(2))

    def learned() -> torch.Tensor:
        p = torch.zeros(8, 8).cuda().requires_grad_()
        loss = lambda pieces: (x[pieces] @ p - y[pieces]).square().mean()  # noqa: E731
        minimise_by_steps({"weight": p}, loss, torch.zeros(16, 512), {"weight": 0.1}, Steps(20, tokens=2048), "")
        return p.detach()

    replayed = learned()
    monkeypatch.setattr(Replayed, "_record", lambda *_: None)
    torch.testing.assert_close(learned(), replayed)
    assert replayed.abs().max() > 0.1


@pytest.mark.parametrize("shape", [(96, 128), (40, 80), (24, 20)])
def test_gptq_is_the_processors(shape):
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(*shape, generator=generator), torch.randn(300, shape[1], generator=generator)
    there, here = (gptq(W.to(d), (X.T @ X).to(d), 4, 32) for d in ("cuda", "cpu"))
    for a, b in zip(there, here, strict=True):
        assert ((a.cpu() - b).abs() > 1e-4).float().mean() < 0.01  # a weight half-way may be rounded either way


@pytest.mark.parametrize("shape", [(64, 64), (5, 64, 64), (1, 576, 576), (2, 100, 100)])
def test_polar_is_the_svds(shape):
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    M[..., 0, :] *= 1e-4
    torch.testing.assert_close(polar(M.cuda()).cpu(), by_svd(M.double()).float(), rtol=0, atol=1e-5)


def test_polar_of_a_singular_matrix_is_a_rotation():
    R = polar(torch.zeros(2, 16, 16).cuda())
    torch.testing.assert_close(R @ R.mT, torch.eye(16).expand(2, 16, 16).cuda(), rtol=0, atol=1e-5)


def test_the_joint_solver_ends_about_as_low():
    """Last digits differ, and lead to one of many minima."""
    acts = {f"model.layers.{i}.q": torch.randn(512, 64, generator=torch.Generator().manual_seed(i)) ** 3
            for i in range(2)}  # fmt: skip
    x = torch.cat([*acts.values()])
    ends = [OBJECTIVES["whip"](x @ train_r1_joint(acts, 64, 2, d))[0].double().mean().item() for d in ("cuda", "cpu")]
    assert ends[0] == pytest.approx(ends[1], rel=0.1)


def test_a_kept_model_is_loaded_onto_a_gpu(tiny_model, tokens, tmp_path):
    model = tiny_model()
    quantize_model(model, 4, 4, 16)
    save_model(model, tmp_path / "m.safetensors")
    found = load_model(tmp_path / "m.safetensors", "cuda")(tokens().cuda()).logits.cpu()
    torch.testing.assert_close(found, model(tokens()).logits, rtol=1e-3, atol=1e-3)


def test_transforms_stay_in_float32_under_autocast():
    x = torch.randn(4, 64).cuda()
    transform = Transform(torch.rand(64).cuda() + 0.5)
    with torch.autocast("cuda", torch.bfloat16):
        assert transform.apply(x.bfloat16()).dtype == torch.float32
