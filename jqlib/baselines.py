"""What the joint solver is compared with: the peers' optimisers, and the layer-by-layer reading."""

import torch
from torch import Tensor
from tqdm import tqdm

from jqlib.solver import Minibatches, minimise, nearby_polar

BATCHES = 12  # batches an epoch: 64 files of 2048 tokens a batch over 10% of 128 samples of 30 layers, 2 sites

GREEDY_STEPS = 4  # a site: more of them forget more of what the other layers gained


def sgd(layers, start: Tensor, objective, lr: float, epochs: int, max_steps, seed: int, record) -> Tensor:
    """DartQuant as published: R is the Q factor of an unconstrained Z; SGD on Z, momentum 0.9, no schedule.

    (B, n, n). The tokens of all layers are pooled and cut into 12 minibatches an epoch, drawn once:
    its sampler yields the same subset in every epoch.
    """
    Z = start.clone().requires_grad_()
    optimiser = torch.optim.SGD([Z], lr=lr, momentum=0.9)
    return _by_autograd(Z, optimiser, layers, objective, epochs, max_steps, seed, record)


def adam(layers, start: Tensor, objective, lr: float, epochs: int, max_steps, seed: int, record) -> Tensor:
    """`sgd` with Adam in the place of SGD: what one tries first when the published learning rate is too small."""
    Z = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([Z], lr=lr)
    return _by_autograd(Z, optimiser, layers, objective, epochs, max_steps, seed, record)


def cayley(layers, start: Tensor, objective, lr: float, epochs: int, max_steps, seed: int, record) -> Tensor:
    """SpinQuant's optimiser (Cayley SGD; Li, Li and Todorovic 2020), on this loss: R⁺ = Cayley(−lr · M) R.

    M, the momentum (0.9), is kept skew: (I + lr/2 M)⁻¹ (I − lr/2 M) R is then a rotation again.
    """
    batches = _batches(layers, seed)
    eye, R, momentum = torch.eye(start.shape[-1], device=start.device), start, torch.zeros_like(start)
    for step in tqdm(_steps(epochs, batches, max_steps), "rotation (Cayley SGD)", unit="step"):
        x = batches[step % len(batches)]
        value, slope = objective(x @ R)
        _check(value, step, lr)
        gradient = x.mT @ slope / x.shape[1]
        momentum = 0.9 * momentum + (gradient @ R.mT - R @ gradient.mT)
        turn = lr / 2 * momentum
        _check(turn, step, lr)
        R = nearby_polar(torch.linalg.solve(eye + turn, (eye - turn) @ R))
        record(R)
    return R


def greedy(layers, start: Tensor, objective, max_steps, seed: int, record) -> Tensor:
    """Layer after layer, each warm-started from the one before and seeing only its own activations.

    ``max_steps`` counts the steps of one site; by default GREEDY_STEPS.
    """
    R = start
    for x in layers:
        batches = Minibatches({"layer": x}, seed, start.device)
        R = minimise(batches, R, objective, record=lambda *_: None, max_steps=max_steps or GREEDY_STEPS)
        record(R)
    return R


def _by_autograd(Z: Tensor, optimiser, layers, objective, epochs, max_steps, seed, record) -> Tensor:
    """Minibatch steps of a torch optimiser on Z; R is the Q factor of Z."""
    batches, lr = _batches(layers, seed), optimiser.param_groups[0]["lr"]
    for step in tqdm(_steps(epochs, batches, max_steps), "rotation (by autograd)", unit="step"):
        Q = _q_factor(Z)
        if step:
            record(Q.detach())
        y = batches[step % len(batches)] @ Q
        value, slope = objective(y.detach())
        _check(value, step, lr)
        optimiser.zero_grad()
        y.backward(slope / y.shape[1])
        optimiser.step()
    _check(Z, step, lr)
    R = _q_factor(Z.detach())
    record(R)
    return R


def _batches(layers, seed: int) -> list[Tensor]:
    """The pooled tokens of all layers, shuffled, in the published number of pieces: (B, tokens, n) each."""
    X = torch.cat(layers, dim=1)
    order = torch.randperm(X.shape[1], generator=torch.Generator().manual_seed(seed)).to(X.device)
    return [X[:, piece] for piece in order.tensor_split(BATCHES) if len(piece)]


def _steps(epochs: int, batches: list, max_steps: int | None) -> range:
    steps = epochs * len(batches)
    return range(steps if max_steps is None else min(steps, max_steps))


def _check(values: Tensor, step: int, lr: float) -> None:
    if not torch.isfinite(values).all():
        raise FloatingPointError(f"the loss turned NaN at step {step} with lr={lr}: lower lr (published: 1e-3), "
                                 "or use solver='mm', which needs none")  # fmt: skip


def _q_factor(Z: Tensor) -> Tensor:
    """Q of Z = QR with a positive diagonal of R, so that Q is continuous in Z."""
    Q, upper = torch.linalg.qr(Z)
    return Q * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
