"""What is learned from: KL by the textbook, its slope by finite differences, predictions made once."""

import pytest
import torch

from jqlib.learn import lessons as module
from jqlib.learn.lessons import Divergence, cut, teach


def parts(tokens=10, hidden=6, vocabulary=17, dtype=torch.double):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, hidden), (vocabulary, hidden), (tokens, hidden), (vocabulary, hidden)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def test_the_loss_is_kl_by_the_textbook_however_many_rows_at_a_time(monkeypatch):
    x, W, t, V = parts()
    p, q = (t @ V.T).log_softmax(-1), (x @ W.T).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    for rows in (256, 3):
        monkeypatch.setattr(module, "ROWS", rows)
        torch.testing.assert_close(Divergence.apply(x, W, t, V), expected)


def test_its_slope_is_right():
    x, *others = parts()
    assert torch.autograd.gradcheck(lambda x: Divergence.apply(x, *others), x.requires_grad_())


def test_a_large_loss_is_compiled_and_the_same():
    x, *others = parts(tokens=300, vocabulary=500, dtype=torch.float32)
    wide = [part.double() for part in (x, *others)]
    x.requires_grad_()
    found, expected = Divergence.apply(x, *others), Divergence.apply(wide[0].requires_grad_(), *wide[1:])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    found.backward()
    expected.backward()
    torch.testing.assert_close(x.grad.double(), wide[0].grad, rtol=1e-3, atol=1e-7)


def test_lessons_are_the_fp_models_and_it_learns_nothing_from_itself(tiny_model, tokens):
    model, windows = tiny_model(), tokens(3, 64)
    lessons = teach(model, windows)
    logits = torch.nn.functional.linear(lessons.hidden, lessons.head)
    torch.testing.assert_close(logits, model(windows).logits, rtol=1e-4, atol=1e-4)
    assert lessons.loss(model, torch.tensor([0, 2])).item() == pytest.approx(0, abs=1e-6)
    assert lessons.loss(tiny_model(seed=1), torch.tensor([0, 2])).item() > 0.1


def test_windows_are_cut_into_pieces(monkeypatch, tokens):
    monkeypatch.setattr(module, "PIECE", 10)
    windows = tokens(2, 24)
    assert torch.equal(cut(windows), torch.stack([w[i : i + 8] for w in windows for i in (0, 8, 16)]))
    assert torch.equal(cut(windows[:, :20]), windows[:, :20].reshape(4, 10))
    assert torch.equal(cut(windows[:, :7]), windows[:, :7])
