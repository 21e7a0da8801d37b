import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from jqlib.learn.activations import collect_activations
from jqlib.learn.smooth import compute_simple_smooth_scale
from jqlib.model.families import site_targets
from jqlib.quant.quantize import quantize_model
from jqlib.transform.build import build, done, fuse_layer_norms, rotate_model, transforms_of
from jqlib.transform.hadamard import hadamard_matrix, random_hadamard
from jqlib.transform.install import online_operations

HIDDEN, KV, D = 48, 2, 8
EXACT = torch.float64, 1e-9
SINGLE = torch.float32, 2e-4


def logits(model, tokens):
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def heads(model, orthogonal, dtype=torch.float64):
    names = site_targets(model, "o")
    return {name: orthogonal(D, seed=i, dtype=dtype, batch=(KV,)) for i, name in enumerate(names)}


@pytest.mark.parametrize(("dtype", "tolerance"), [EXACT, SINGLE])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("parts", ["", "r1", "r2", "smooth", "r4", "r1 r2", "r1 r2 smooth r4"])
def test_logits_survive(tiny_model, tokens, orthogonal, double_norms, dtype, tolerance, biases, parts):
    model, batch = tiny_model(biases=biases, dtype=dtype), tokens()
    expected = logits(model, batch)
    smooth = compute_simple_smooth_scale(model, batch) if "smooth" in parts else None
    R2 = heads(model, orthogonal) if "r2" in parts else None
    fuse_layer_norms(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    R1 = orthogonal(HIDDEN) if "r1" in parts else None
    rotate_model(model, R1, R2, smooth, r4="r4" in parts)
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=tolerance * expected.abs().max().item())
    changed = {name.split(".")[-2] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    stream = {"embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"}
    touched = {"r1": stream, "r2": {"v_proj", "o_proj"}, "smooth": {"v_proj", "o_proj", "up_proj", "down_proj"},
               "r4": {"down_proj"}}  # fmt: skip
    assert changed == set().union(*(touched[part] for part in parts.split()))


@pytest.mark.parametrize("online", [(), ("down",), ("qkv", "o", "ug", "down")])
def test_the_cost_of_online_transforms_is_what_torch_counts(tiny_model, tokens, online):
    model, counted = tiny_model(dtype=torch.float64), {}  # in float32 it is torch.mm on some processors only
    linears = sum(m.weight.numel() for name, m in model.named_modules() if name.endswith("_proj"))
    for when in ("before", "after"):
        with FlopCounterMode(display=False) as counter:
            logits(model, tokens())
        counted[when] = counter.get_total_flops() / 2 / tokens().numel()  # a multiply-add is two
        if when == "before":
            rotate_model(model, None, r4=False, online=online)
    assert online_operations(model) * linears == pytest.approx(counted["after"] - counted["before"])


@pytest.mark.parametrize("fused", [False, True])
def test_a_transform_online_at_every_site(tiny_model, tokens, double_norms, fused):
    """Behind a norm it needs no fusing: what it reads is H/√n times the input of the model as it was."""
    model, batch = tiny_model(biases=True, dtype=torch.float64), tokens()
    if fused:
        fuse_layer_norms(model)
    expected, before = logits(model, batch), copy.deepcopy(model)
    sites = ("qkv", "o", "ug", "down")
    rotate_model(model, None, online=sites[:3])
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    targets = site_targets(model, *sites)
    plain = collect_activations(before, batch, targets, max_tokens=None, raw=True)
    for name, x in collect_activations(model, batch, targets, max_tokens=None, raw=True).items():
        n = x.shape[-1]
        torch.testing.assert_close(x, plain[name] @ hadamard_matrix(n) / n**0.5, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="site 'donw' is unknown; there are qkv, o, ug, down"):
        rotate_model(tiny_model(), None, online=("donw",))


@pytest.mark.parametrize("biases", [False, True])
def test_fusing_alone_keeps_logits_and_makes_gamma_one(tiny_model, tokens, double_norms, biases):
    model = tiny_model(biases=biases, dtype=torch.float64)
    expected, embedding = logits(model, tokens()), model.model.embed_tokens.weight.clone()
    fuse_layer_norms(model)
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-12)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert len(norms) == 5
    assert all(torch.all(gamma == 1) for gamma in norms)
    assert torch.equal(model.model.embed_tokens.weight, embedding), "the embedding's mean must stay"
    assert done(model) == {"fused"}


def test_rotations_stand_where_the_method_puts_them(tiny_model, orthogonal):
    """The table of ALGORITHM.md §1, written out with explicit block matrices."""
    model = tiny_model(biases=True, dtype=torch.float64)
    fuse_layer_norms(model)
    before = copy.deepcopy(model).model.layers[1]
    R, R2 = orthogonal(HIDDEN, seed=9), heads(model, orthogonal)
    rotate_model(model, R, R2)
    after = model.model.layers[1]
    per_kv = R2["model.layers.1.self_attn.o_proj"]
    V, Q = torch.block_diag(*per_kv), torch.block_diag(*(per_kv[h // 3] for h in range(6)))
    H = hadamard_matrix(96).double() / 96**0.5

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    old, new = before.self_attn, after.self_attn
    close(new.q_proj.weight, old.q_proj.weight @ R)
    close(new.q_proj.bias, old.q_proj.bias)
    close(new.v_proj.weight, V.T @ old.v_proj.weight @ R)
    close(new.v_proj.bias, old.v_proj.bias @ V)
    close(new.o_proj.weight, R.T @ old.o_proj.weight @ Q)
    close(new.o_proj.bias, old.o_proj.bias @ R)
    close(after.mlp.up_proj.weight, before.mlp.up_proj.weight @ R)
    close(after.mlp.up_proj.bias, before.mlp.up_proj.bias)
    close(after.mlp.down_proj.weight, R.T @ before.mlp.down_proj.weight @ H)
    close(after.mlp.down_proj.bias, before.mlp.down_proj.bias @ R)


@pytest.mark.parametrize("biases", [False, True])
def test_untied_and_saved_checkpoint_reloads(tiny_model, tokens, orthogonal, tmp_path, biases):
    model = tiny_model(biases=biases)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    fuse_layer_norms(model)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model.config.tie_word_embeddings is False
    rotate_model(model, orthogonal(HIDDEN), heads(model, orthogonal), r4=False)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again, tokens()), expected)


def test_bfloat16_stays_and_merges_once(tiny_model, tokens):
    """Merged in float64 and cast once: as near to the float32 merge as bfloat16's rounding allows."""
    half = tiny_model(dtype=torch.bfloat16)
    full = copy.deepcopy(half).float()
    R = random_hadamard(HIDDEN, seed=0)
    for model in (half, full):
        fuse_layer_norms(model)
        rotate_model(model, R, None)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half.model.embed_tokens.weight, full.model.embed_tokens.weight.bfloat16())
    for a, b in zip(half.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02)
    error = (logits(half, tokens()).float() - logits(full, tokens())).norm() / logits(full, tokens()).norm()
    assert error < 0.05


def skewed(n: int, orthogonal):
    matrix = orthogonal(n)
    matrix[0] *= 1.01
    return matrix


NAME = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(("R1", "R2", "message"), [
    (lambda o: o(40), None, r"R1 has shape \(40, 40\), expected \(48, 48\)"),
    (lambda o: o(48)[:, :40], None, r"R1 has shape \(48, 40\)"),
    (lambda o: skewed(48, o), None, r"R1 is not orthogonal: the largest entry of \|RᵀR − I\| is 0.0"),
    (lambda o: o(48) * torch.nan, None, "R1 is not orthogonal"),
    (lambda o: torch.zeros(48, 48), None, "R1 is not orthogonal: .* is 1"),
    (None, lambda o: {NAME: o(8, batch=(6,))}, rf"R2 of {NAME} has shape \(6, 8, 8\), expected \(2, 8, 8\)"),
    (None, lambda o: {NAME: o(8)}, r"has shape \(8, 8\), expected \(2, 8, 8\)"),
    (None, lambda o: {NAME: torch.ones(2, 8, 8)}, f"R2 of {NAME} is not orthogonal"),
    (None, lambda o: {"layers.0.o_proj": o(8, batch=(2,))}, f"R2 names 'layers.0.o_proj'; expected .* '{NAME}'"),
])  # fmt: skip
def test_bad_rotations_leave_the_model_alone(tiny_model, orthogonal, R1, R2, message):
    model = tiny_model()
    fuse_layer_norms(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        rotate_model(model, R1 and R1(orthogonal), R2 and R2(orthogonal))
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert done(model) == {"fused"}


def test_logits_survive_norm_scales(tiny_model, tokens, orthogonal, double_norms):
    model = tiny_model(dtype=torch.float64)
    expected = model(tokens()).logits
    fuse_layer_norms(model)
    scales = {f"model.layers.{i}.{r}": torch.linspace(0.3, 3, HIDDEN).roll(7 * i) for i in range(2)
              for r in ("self_attn.q_proj", "mlp.up_proj")}  # fmt: skip
    rotate_model(model, orthogonal(HIDDEN), norm_scale=scales)
    gain = model.model.layers[1].input_layernorm.weight
    torch.testing.assert_close(gain, scales["model.layers.1.self_attn.q_proj"].double())
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-6, atol=1e-6)


def test_a_model_whose_weights_want_gradients(tiny_model, tokens, orthogonal):
    """As transformers gives it."""
    model = tiny_model().requires_grad_()
    expected, scales = logits(model, tokens()), compute_simple_smooth_scale(model, tokens())
    assert not any(scale.requires_grad for scale in scales.values())
    fuse_layer_norms(model)
    rotate_model(model, orthogonal(HIDDEN), smooth_scale=scales)
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rotated", "scale", "message"), [
    (False, {"model.layers.0.mlp.up_proj": torch.ones(48)}, "norm_scale acts behind R1: give R1 too"),
    (True, {NAME: torch.ones(48)}, f"norm_scale names '{NAME}'; expected .* 'model.layers.0.self_attn.q_proj'"),
    (True, {"model.layers.0.mlp.up_proj": torch.ones(8)}, r"expected 48 positive numbers, got shape \(8,\)"),
    (True, {"model.layers.0.mlp.up_proj": torch.zeros(48)},
     r"expected 48 positive numbers, got shape \(48,\), values from 0 to 0"),
])  # fmt: skip
def test_bad_norm_scales_leave_the_model_alone(tiny_model, orthogonal, rotated, scale, message):
    model = tiny_model()
    fuse_layer_norms(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        rotate_model(model, orthogonal(48, 0, torch.float32) if rotated else None, norm_scale=scale)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_order_of_steps_is_enforced(tiny_model, orthogonal):
    model, R = tiny_model(), orthogonal(HIDDEN)
    with pytest.raises(RuntimeError, match="R1 needs a model whose norms are fused: call fuse_layer_norms"):
        rotate_model(model, R)
    fuse_layer_norms(model)
    with pytest.raises(RuntimeError, match="fused already"):
        fuse_layer_norms(model)
    rotate_model(model, R)
    with pytest.raises(RuntimeError, match="rotated already"):
        rotate_model(model, R)
    with pytest.raises(RuntimeError, match="fused already"):
        fuse_layer_norms(model)
    with pytest.raises(RuntimeError, match="rotated already"):  # R4 lies in between now
        rotate_model(model, None, None, {}, r4=False)


@pytest.mark.parametrize("rotated", [False, True])
def test_scales_of_a_norm_are_refused_by_a_fused_model(tiny_model, tokens, orthogonal, rotated):
    """They would make gamma differ from 1 again, and R1 does not commute with gamma."""
    model = tiny_model()
    scales = compute_simple_smooth_scale(model, tokens(), sites=("qkv", "ug"))
    fuse_layer_norms(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"scales of model\.layers\.0\.self_attn\.q_proj belong into a norm"):
        rotate_model(model, orthogonal(HIDDEN) if rotated else None, None, scales)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_scales_of_a_norm_go_before_a_transform_online(tiny_model, tokens, double_norms):
    model, batch = tiny_model(dtype=torch.float64), tokens()
    expected, sites = logits(model, batch), ("qkv", "o", "ug", "down")
    scales = compute_simple_smooth_scale(model, batch, sites=sites)
    plain = collect_activations(model, batch, list(scales), max_tokens=None, raw=True)
    rotate_model(model, None, None, scales, online=sites)
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    for name, x in collect_activations(model, batch, list(scales), max_tokens=None, raw=True).items():
        s, n = scales[name], x.shape[-1]
        s = s if len(s) == n else s.view(KV, 1, D).repeat(1, 3, 1).flatten()
        torch.testing.assert_close(x, (plain[name] / s) @ hadamard_matrix(n) / n**0.5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("merged", "site"), [("R1", "qkv"), ("R1", "ug"), ("R2", "o")])
def test_a_site_has_one_rotation(tiny_model, orthogonal, merged, site):
    model = tiny_model()
    fuse_layer_norms(model)
    before = copy.deepcopy(model.state_dict())
    R1, R2 = (orthogonal(HIDDEN), None) if merged == "R1" else (None, heads(model, orthogonal))
    with pytest.raises(ValueError, match=f"site '{site}' would have two rotations: {merged} and a Hadamard"):
        rotate_model(model, R1, R2, online=(site,))
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize("step", ["fuse", "rotate", "scale", "build"])
def test_a_channel_whose_gamma_is_zero(tiny_model, tokens, orthogonal, double_norms, step):
    model, batch = tiny_model(dtype=torch.float64), tokens()
    for layer in model.model.layers:
        layer.input_layernorm.weight[3] = layer.post_attention_layernorm.weight[5] = 0
    expected = logits(model, batch)
    if step in ("fuse", "rotate"):
        fuse_layer_norms(model)
    if step == "rotate":
        rotate_model(model, orthogonal(HIDDEN))
    if step == "scale":
        rotate_model(model, None, None, compute_simple_smooth_scale(model, batch, sites=("qkv", "ug")))
    if step == "build":
        build(model, transforms_of(model, orthogonal(HIDDEN), online=("down",)))
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-9 * expected.abs().max().item())


def test_built_in_one_go_a_bfloat16_weight_is_cast_once(tiny_model, tokens, orthogonal):
    """v_proj takes gamma, R1, a gain, scales and R2: it is what float64 makes of all five, and then bfloat16."""
    model, name = tiny_model(biases=True, dtype=torch.bfloat16), "model.layers.1.self_attn.o_proj"
    smooth = compute_simple_smooth_scale(model, tokens())
    R1, R2 = orthogonal(HIDDEN, 9, torch.float32), heads(model, orthogonal, torch.float32)
    gain = torch.linspace(0.3, 3, HIDDEN)
    layer = copy.deepcopy(model.model.layers[1])
    norm_scale = {"model.layers.1.self_attn.q_proj": gain}
    build(model, transforms_of(model, R1, R2, smooth, norm_scale, online=("down",)))
    new = model.model.layers[1]
    assert torch.equal(new.input_layernorm.weight, gain.bfloat16())
    gamma, s = layer.input_layernorm.weight.double(), smooth[name].double()
    V, held = torch.block_diag(*R2[name].double()), gain.bfloat16().double()
    weight = V.T @ ((layer.self_attn.v_proj.weight.double() * gamma) @ R1.double() / held / s[:, None])
    assert torch.equal(new.self_attn.v_proj.weight, weight.bfloat16())
    assert torch.equal(new.self_attn.v_proj.bias, ((layer.self_attn.v_proj.bias.double() / s) @ V).bfloat16())
    thrice = (layer.self_attn.v_proj.weight.double() * gamma).bfloat16().double() @ R1.double() / held
    thrice = V.T @ (thrice.bfloat16().double() / s[:, None])
    assert not torch.equal(new.self_attn.v_proj.weight, thrice.bfloat16())  # the test would see another cast


def test_built_in_one_go_is_step_by_step(tiny_model, tokens, orthogonal, double_norms):
    model, batch = tiny_model(biases=True, dtype=torch.float64), tokens()
    smooth, R1, R2 = compute_simple_smooth_scale(model, batch), orthogonal(HIDDEN), heads(model, orthogonal)
    steps = copy.deepcopy(model)
    build(model, transforms_of(model, R1, R2, smooth, online=("down",)))
    fuse_layer_norms(steps)
    rotate_model(steps, R1, R2, smooth)
    assert done(model) == done(steps) == {"fused", "rotated"}
    expected = steps.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, p in model.state_dict().items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", ["fuse", "rotate", "smooth"])
def test_a_quantised_model_is_not_changed_any_more(tiny_model, tokens, orthogonal, step):
    model = tiny_model()
    scales = compute_simple_smooth_scale(model, tokens())
    if step == "rotate":
        fuse_layer_norms(model)
    quantize_model(model)
    call = {"fuse": fuse_layer_norms, "rotate": lambda m: rotate_model(m, orthogonal(HIDDEN)),
            "smooth": lambda m: rotate_model(m, None, None, scales, r4=False)}[step]  # fmt: skip
    with pytest.raises(RuntimeError, match="quantised already"):
        call(model)
