"""What the joint solver is compared with: DartQuant's own optimiser, and the layer-by-layer reading."""

import torch
from torch import Tensor
from tqdm import tqdm

BATCHES = 12  # batches an epoch: 64 files of 2048 tokens a batch over 10% of 128 samples of 30 layers, 2 sites

GREEDY_STEPS = 4  # a site: more of them forget more of what the other layers gained


def sgd(layers, start: Tensor, objective, lr: float, epochs: int, max_steps, seed: int, record) -> Tensor:
    """DartQuant as published: R is the Q factor of an unconstrained Z; SGD on Z, momentum 0.9, no schedule.

    (B, n, n). The tokens of all layers are pooled and cut into 12 minibatches an epoch, drawn once:
    its sampler yields the same subset in every epoch.
    """
    X = torch.cat(layers, dim=1)  # (B, tokens, n)
    batches = (
        torch.randperm(X.shape[1], generator=torch.Generator().manual_seed(seed)).to(X.device).tensor_split(BATCHES)
    )
    batches = [batch for batch in batches if len(batch)]
    Z = start.clone().requires_grad_()
    optimiser = torch.optim.SGD([Z], lr=lr, momentum=0.9)
    steps = epochs * len(batches)
    if max_steps is not None:
        steps = min(steps, max_steps)
    for step in tqdm(range(steps), "rotation (SGD)", unit="step"):
        R = _q_factor(Z)
        value, _ = objective(X[:, batches[step % len(batches)]] @ R)
        loss = value.mean(-1).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss turned NaN at step {step} with lr={lr}: lower lr (published: 1e-3), "
                                     "or use solver='mm', which needs none")  # fmt: skip
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        record(_q_factor(Z.detach()))
    if not torch.isfinite(Z).all():
        raise FloatingPointError(f"the rotation turned NaN with lr={lr}: lower lr, or use solver='mm'")
    return _q_factor(Z.detach())


def greedy(layers, start: Tensor, objective, max_steps, seed: int, record, minimise) -> Tensor:
    """Layer after layer, each warm-started from the one before and seeing only its own activations.

    ``max_steps`` counts the steps of one site; by default GREEDY_STEPS.
    """
    R = start
    for x in layers:
        R = minimise(x, R, objective, record=lambda *_: None, max_steps=max_steps or GREEDY_STEPS, seed=seed)
        record(R)
    return R


def _q_factor(Z: Tensor) -> Tensor:
    """Q of Z = QR with a positive diagonal of R, so that Q is continuous in Z."""
    Q, upper = torch.linalg.qr(Z)
    return Q * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
