"""What a model says, and its loss token by token."""

import pytest
import torch

from jqlib.lab.told import by_frequency, by_position, continuation, losses
from jqlib.model.evaluate import last_hidden, read_window


def test_losses_are_the_tokens_own(tiny_model, tokens):
    """Their mean is the evaluation's, and each is what the whole model says of that token."""
    model, windows = tiny_model(), tokens(3, 24)
    found = losses(model.get_output_embeddings(), last_hidden(model, windows), windows)
    assert found.shape == (3, 23)
    for row, window in zip(found, windows, strict=True):
        assert row.mean().item() == pytest.approx(read_window(model, window)[0], rel=1e-5)
        chances = model(window[None]).logits[0].log_softmax(-1)
        torch.testing.assert_close(row[7], -chances[7, window[8]], rtol=1e-4, atol=1e-5)


def test_positions_are_counted_from_the_windows_first_token():
    extra = torch.zeros(2, 20)  # of tokens 1 to 20
    extra[:, 0], extra[:, 7], extra[:, 19] = 7.0, 1.0, 10.0
    table = by_position(extra)
    assert list(zip(table["first"], table["last"], strict=True)) == [(1, 7), (8, 15), (16, 20)]
    assert table.extra.tolist() == [1.0, 0.125, 2.0]
    assert table.share.tolist() == pytest.approx([7 / 18, 1 / 18, 10 / 18])
    assert not table.error.any()  # both windows alike


@pytest.mark.parametrize("tokens", range(1, 40))
def test_positions_cover_every_token_once(tokens):
    table = by_position(torch.ones(1, tokens))
    assert table["first"].iloc[0] == 1
    assert table["last"].iloc[-1] == tokens
    assert (table["first"].iloc[1:].to_numpy() == table["last"].iloc[:-1] + 1).all()
    assert table.share.sum() == pytest.approx(1)


def test_frequency_is_that_of_the_other_text():
    windows = torch.tensor([[9, 1, 2, 3, 1]])
    seen = torch.tensor([1] * 120 + [2] * 5)
    table = by_frequency(torch.tensor([[1.0, 2.0, 5.0, 3.0]]), windows, seen)
    assert table.loc["100 or more"].tolist() == pytest.approx([2, 2.0, 4 / 11])  # token 1, twice
    assert table.loc["1 to 9"].tolist() == pytest.approx([1, 2.0, 2 / 11])
    assert table.loc["never"].tolist() == pytest.approx([1, 5.0, 5 / 11])


def test_a_continuation_is_the_likeliest_token_each_time(tiny_model, tiny_tokenizer):
    model, prompt = tiny_model(), "abc"
    ids = tiny_tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert continuation(model, tiny_tokenizer, prompt, 4) == tiny_tokenizer.decode(ids[0, 3:])
