"""Attention shares: everyone's, whole, and the model is afterwards as it was."""

import torch

from jqlib.lab.sink import attention_of, on_the_first


def test_attention_is_everyones_and_leaves_the_model_as_it_was(tiny_model, tokens):
    model, ids = tiny_model(), tokens(1, 24)
    usual, before = model.config._attn_implementation, model(ids).logits
    shares = attention_of(model, ids[0])
    assert shares.shape == (2, 6, 24, 24)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 6, 24))
    assert not shares.triu(1).any()
    assert model.config._attn_implementation == usual
    assert torch.equal(model(ids).logits, before)  # the fast attention is back


def test_what_the_first_token_is_given_by_the_others():
    shares = torch.eye(3).expand(2, 6, 3, 3).clone()
    shares[1, :, 1:] = torch.tensor([0.5, 0.5, 0.0])
    assert on_the_first(shares).tolist() == [[0.0] * 6, [0.5] * 6]
