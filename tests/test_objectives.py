import pytest
import torch

from jqlib.learn.objectives import OBJECTIVES, mean_loss
from jqlib.transform.grids import quantize_activation

EPSILON = 1e-6


def tokens(*shape, seed: int = 0):
    """Heavy-tailed, no entry near the kinks at 0."""
    y = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return y + 0.1 * y**3 + 0.05 * y.sign()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_derivative_is_that_of_the_value(name):
    objective = OBJECTIVES[name]
    y = tokens(3, 7, 5)
    value, slope = objective(y)
    assert value.shape == (3, 7)
    assert slope.shape == y.shape
    for j in range(y.shape[-1]):
        step = torch.zeros(5, dtype=torch.float64)
        step[j] = EPSILON
        difference = (objective(y + step)[0] - objective(y - step)[0]) / (2 * EPSILON)
        torch.testing.assert_close(slope[..., j], difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "by_hand"), [
    ("whip", lambda y: y.abs().neg().exp().sum(-1)),
    ("range", lambda y: (y.amax(-1) - y.amin(-1)) ** 2),
    ("kurtosis", lambda y: (y**4).sum(-1)),
    ("lp", lambda y: (y**8).sum(-1) ** 0.25),
])  # fmt: skip
def test_values_and_gradient_against_autograd(name, by_hand):
    X, R = tokens(2, 50, 6), tokens(2, 6, 6, seed=1).requires_grad_()
    expected = by_hand(X @ R).mean(-1)
    expected.sum().backward()
    loss, gradient = mean_loss([X], R.detach(), OBJECTIVES[name], chunk=7)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, R.grad)


def test_quant_error_is_what_rounding_to_four_bits_costs():
    y = tokens(9, 6)
    torch.testing.assert_close(OBJECTIVES["quant_error"](y)[0], (quantize_activation(y, 4) - y).square().sum(-1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_are_per_token(name):
    """A token's value and derivative do not depend on its neighbours, nor the mean on how tokens are chunked."""
    objective, y = OBJECTIVES[name], tokens(9, 6)
    value, slope = objective(y)
    for t in range(9):
        alone, its_slope = objective(y[t : t + 1])
        torch.testing.assert_close(alone[0], value[t])
        torch.testing.assert_close(its_slope[0], slope[t])
    R = torch.eye(6, dtype=torch.float64)[None]
    for pieces, whole in zip(mean_loss([y[None]], R, objective, 2), mean_loss([y[None]], R, objective), strict=True):
        torch.testing.assert_close(pieces, whole)


def test_whip_is_finite_and_bounded_at_extremes():
    y = torch.tensor([[0.0, -0.0, 1e30, -1e30]])
    value, slope = OBJECTIVES["whip"](y)
    assert value.tolist() == [2.0]
    assert slope.abs().tolist() == [[1, 1, 0, 0]]
