"""The way from no rotation to a rotation: R(t) = exp(t log R), the shortest path of SO(n), and a film of it."""

import base64
from pathlib import Path

import numpy as np
import torch
from IPython.display import HTML
from scipy.linalg import schur
from torch import Tensor

from jqlib.lab.tokens import Turning
from jqlib.product import product

SMALL = 1e-6  # below it an entry under the diagonal is 0, and two cosines are the same


class Geodesic:
    """R(t) = exp(t log R) for an orthogonal ``R``, (n, n): R(0) = I, R(1) = R, and each plane of R turns evenly.

    The real Schur form R = Z T Zᵀ gives the planes: T is the identity but for 2 × 2 rotations by an angle θ, which
    become rotations by tθ. Entries −1 are paired to planes that turn by π. R + Rᵀ is 2 cos θ in a plane: its
    eigenvectors part planes of different angles, ten times sooner than the Schur form, which parts those of the same.
    No path leads from I to an R of determinant −1: there the last column changes its sign, one new channel in n
    (``flipped``).
    """

    def __init__(self, R: Tensor):
        R = R.double().numpy().copy()
        self.flipped = np.linalg.slogdet(R)[0] < 0
        if self.flipped:
            R[:, -1] *= -1
        cosines, Z = np.linalg.eigh(R + R.T)
        T = Z.T @ R @ Z
        for same in np.split(np.arange(len(T)), np.flatnonzero(np.diff(cosines) > SMALL) + 1):
            if len(same) > 2:
                T[np.ix_(same, same)], inside = schur(T[np.ix_(same, same)])
                Z[:, same] = Z[:, same] @ inside
        first = np.flatnonzero(np.abs(np.diag(T, -1)) > SMALL)
        alone = np.setdiff1d(np.arange(len(T)), [first, first + 1])
        turned = alone[np.diag(T)[alone] < 0]  # an even number of them: the determinant is 1
        angles = np.arctan2(T[first, first + 1], T[first, first])
        self.Z = torch.from_numpy(Z).float()
        self.planes = torch.from_numpy(np.concatenate([first, turned[::2]]))
        self.partners = torch.from_numpy(np.concatenate([first + 1, turned[1::2]]))
        self.angles = torch.from_numpy(np.concatenate([angles, np.full(len(turned) // 2, np.pi)])).float()

    def of(self, x: Tensor, t: float) -> Tensor:
        """x R(t), (tokens, n)."""
        z = product(x, self.Z)
        a, b, cos, sin = z[:, self.planes], z[:, self.partners], (t * self.angles).cos(), (t * self.angles).sin()
        z[:, self.planes], z[:, self.partners] = a * cos - b * sin, a * sin + b * cos
        return product(z, self.Z.T)


def film(x: Tensor, R: Tensor, bits: int, to: Path, frames: int = 40) -> HTML:
    """One token, (n,), on its way from I to ``R``, in equal steps, as a GIF 750 pixels wide that rests at both ends;
    returned as what a notebook shows of it."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    to.parent.mkdir(parents=True, exist_ok=True)
    path = Geodesic(R)
    times = [*[0.0] * 14, *np.linspace(0, 1, frames).tolist(), *[1.0] * 18]
    states = {t: path.of(x[None], t)[0].numpy() for t in dict.fromkeys(times)}
    turning = Turning(states[0.0], states[1.0], bits)
    animation = FuncAnimation(turning.figure, lambda t: turning.show(states[t], t), times, blit=False)
    animation.save(to, PillowWriter(fps=12), dpi=100)
    data = base64.b64encode(to.read_bytes()).decode()
    return HTML(f'<img alt="A token on its way to its rotation" src="data:image/gif;base64,{data}">')
