"""What the joint solver is compared with: the peers' optimisers, and the layer-by-layer reading."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from jqlib.choices import Objective, Solver
from jqlib.learn.objectives import Loss
from jqlib.learn.solver import Minibatches, minimise
from jqlib.product import product
from jqlib.transform.orthogonal import nearby_polar

BATCHES = 12  # batches an epoch: 64 files of 2048 tokens a batch over 10% of 128 samples of 30 layers, 2 sites

GREEDY_STEPS = 4  # a site: more of them forget more of what the other layers gained


@dataclass(frozen=True)
class Training:
    """How a rotation is trained: see `jqlib.learn.rotations.train_r1_joint`."""

    solver: Solver
    objective: Objective
    lr: float
    epochs: int
    max_steps: int | None
    seed: int
    history: list[dict] | None


def sgd(layers, start: Tensor, loss: Loss, training: Training, record) -> Tensor:
    """DartQuant as published: R is the Q factor of an unconstrained Z; SGD on Z, momentum 0.9, no schedule.

    (B, n, n). The tokens of all layers are pooled and cut into 12 minibatches an epoch, drawn once:
    its sampler yields the same subset in every epoch.
    """
    Z = start.clone().requires_grad_()
    optimiser = torch.optim.SGD([Z], lr=training.lr, momentum=0.9)
    return _by_autograd(Z, optimiser, layers, loss, training, record)


def adam(layers, start: Tensor, loss: Loss, training: Training, record) -> Tensor:
    """`sgd` with Adam in the place of SGD: what one tries first when the published learning rate is too small."""
    Z = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([Z], lr=training.lr)
    return _by_autograd(Z, optimiser, layers, loss, training, record)


def cayley(layers, start: Tensor, loss: Loss, training: Training, record) -> Tensor:
    """SpinQuant's optimiser (Cayley SGD; Li, Li and Todorovic 2020), on this loss: R⁺ = Cayley(−lr · M) R.

    M, the momentum (0.9), is kept skew: (I + lr/2 M)⁻¹ (I − lr/2 M) R is then a rotation again.
    """
    batches, lr = _batches(layers, training.seed), training.lr
    eye, R, momentum = torch.eye(start.shape[-1], device=start.device), start, torch.zeros_like(start)
    for step in tqdm(_steps(training, batches), "rotation (Cayley SGD)", unit="step"):
        x = batches[step % len(batches)]
        value, slope = loss(product(x, R))
        _check(value, step, lr)
        gradient = product(x.mT, slope) / x.shape[1]
        momentum = 0.9 * momentum + (gradient @ R.mT - R @ gradient.mT)
        turn = lr / 2 * momentum
        _check(turn, step, lr)
        R = nearby_polar(torch.linalg.solve(eye + turn, (eye - turn) @ R))
        record(R)
    return R


def greedy(layers, start: Tensor, loss: Loss, training: Training, record) -> Tensor:
    """Layer after layer, each warm-started from the one before and seeing only its own activations.

    ``max_steps`` counts the steps of one site; by default GREEDY_STEPS.
    """
    R = start
    for x in layers:
        batches = Minibatches({"layer": x}, training.seed, start.device)
        R = minimise(batches, R, loss, record=lambda *_: None, max_steps=training.max_steps or GREEDY_STEPS)
        record(R)
    return R


def _by_autograd(Z: Tensor, optimiser, layers, loss: Loss, training: Training, record) -> Tensor:
    """Minibatch steps of a torch optimiser on Z; R is the Q factor of Z."""
    batches, lr = _batches(layers, training.seed), training.lr
    for step in tqdm(_steps(training, batches), "rotation (by autograd)", unit="step"):
        Q = _q_factor(Z)
        if step:
            record(Q.detach())
        y = product(batches[step % len(batches)], Q)
        value, slope = loss(y.detach())
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


def _steps(training: Training, batches: list) -> range:
    steps = training.epochs * len(batches)
    return range(steps if training.max_steps is None else min(steps, training.max_steps))


def _check(values: Tensor, step: int, lr: float) -> None:
    if not torch.isfinite(values).all():
        raise FloatingPointError(f"the loss turned NaN at step {step} with lr={lr}: lower lr (published: 1e-3), "
                                 "or use solver='mm', which needs none")  # fmt: skip


def _q_factor(Z: Tensor) -> Tensor:
    """Q of Z = QR with a positive diagonal of R, so that Q is continuous in Z."""
    Q, upper = torch.linalg.qr(Z)
    return Q * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
