"""Hadamard matrices of any size a language model has, and a fast transform.

A matrix of order n is the Kronecker product of small ones, each from a classical construction
(Sylvester, Paley I and II, Williamson). The transform applies the small factors one after the other.
For a size that has none here (13,696 = 107 · 128, or a head of 100), a transform has blocks of the largest order that
divides it.
"""

from functools import cache

import torch
from torch import Tensor

from jqlib.product import product

SYLVESTER = 128  # powers of two are applied in blocks of at most this order (fastest of 8..128 on a CPU)

# Williamson's four symmetric circulants of order m, for 4m. Of each first row the first m // 2 + 1
# signs are the last bits of a hex number, most significant first, 1 = +.
WILLIAMSON = {
    52: "7a 45 62 62",
    156: "e504c e68a4 f130a 8d41d",
    172: "31e930 3acaf4 37e14d 233d76",
}


def hadamard_matrix(n: int) -> Tensor:
    """A Hadamard matrix: float32, (n, n), entries ±1, ``H @ H.T == n * I``.

    Raises ValueError if no construction here gives order n.
    """
    H = torch.ones(1, 1)
    for order in factors(n):
        H = torch.kron(H, _base(order))
    return H


def hadamard_transform(x: Tensor, inverse: bool = False) -> Tensor:
    """``x @ H / sqrt(m)`` (``inverse``: by H's transpose), (..., n), at the cost of the small factors.

    H is a Hadamard matrix of order m = `block_order` (n), n itself if there is one, for each block of m channels.
    """
    n = x.shape[-1]
    y = x.reshape(-1, n).contiguous().to(torch.promote_types(x.dtype, torch.float32))
    block = 1  # what follows the axis of the current factor
    with torch.autocast(x.device.type, enabled=False):  # in bfloat16 a massive channel would drown the others
        for order in reversed(factors(block_order(n))):
            H = _factor(order, y.dtype, y.device)
            H = H.T if inverse else H
            y = y.view(-1, order, block)  # (tokens · before, order, block)
            y = product(y.view(-1, order), H) if block == 1 else H.T @ y
            block *= order
    return y.reshape(x.shape).to(x.dtype)


@cache
def _factor(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode that it is first asked for in
        return _base(order).to(device, dtype) / order**0.5


def transform_operations(n: int) -> int:
    """Multiply-adds of `hadamard_transform` for one token of n channels."""
    return n * sum(factors(block_order(n)))


def random_hadamard(n: int, seed: int) -> Tensor:
    """A random orthogonal Hadamard rotation: float32, (n, n), rows of H/√n with random signs (QuaRot §3).

    Blocks of `block_order` (n) channels, one or more.
    """
    signs = torch.randint(0, 2, (n, 1), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    order = block_order(n)
    return signs * torch.block_diag(*[hadamard_matrix(order)] * (n // order)) / order**0.5


@cache
def block_order(n: int) -> int:
    """The largest order of a Hadamard matrix here that divides n. ValueError if that is only 1, for an n above 1."""
    for blocks in range(1, n):
        if n % blocks == 0 and _has_factors(n // blocks):
            return n // blocks
    factors(n)  # raises, unless n is 1
    return n


def in_blocks(n: int) -> str:
    """How a rotation of this size is made of Hadamard matrices: "4 blocks of 144", "whole", or "none"."""
    try:
        order = block_order(n)
    except ValueError:
        return "none"
    return "whole" if order == n else f"{n // order} blocks of {order}"


def _has_factors(n: int) -> bool:
    try:
        return bool(n > 1 and factors(n))
    except ValueError:
        return False


@cache
def factors(n: int) -> tuple[int, ...]:
    """Orders of the small factors of n, their product: as many powers of two as possible, at most SYLVESTER each."""
    if n < 1:
        raise ValueError(f"a Hadamard matrix needs order 1 or more, got {n}")
    if n & (n - 1) == 0:
        return (n,) if n <= SYLVESTER else (SYLVESTER, *factors(n // SYLVESTER))
    for order in range(12, n + 1, 4):  # the smallest dense factor is the cheapest
        if n % order == 0 and order & (order - 1) and _constructible(order):
            try:
                return (order, *(factors(n // order) if order < n else ()))
            except ValueError:
                continue
    raise ValueError(
        f"no Hadamard matrix of order {n} here: orders are products of powers of two and of "
        "q+1 or 2(q+1) for primes q (Paley), 52, 156 and 172 (Williamson)"
    )


def _constructible(n: int) -> bool:
    return n in WILLIAMSON or (n % 4 == 0 and (_is_prime(n - 1) or (n % 8 == 4 and _is_prime(n // 2 - 1))))


@cache
def _base(n: int) -> Tensor:
    if n & (n - 1) == 0:
        H = torch.ones(1, 1)
        while len(H) < n:
            H = torch.kron(H, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        return H
    if n in WILLIAMSON:
        return _williamson(n)
    return _paley_1(n - 1) if _is_prime(n - 1) else _paley_2(n // 2 - 1)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """(q, q): the quadratic character of i − j modulo the prime q."""
    character = torch.full((q,), -1.0)
    character[[i * i % q for i in range(q)]] = 1
    character[0] = 0
    index = torch.arange(q)
    return character[(index[:, None] - index[None, :]) % q]


def _paley_1(q: int) -> Tensor:
    """Order q + 1 for a prime q ≡ 3 mod 4: I + a skew-symmetric conference matrix."""
    S = torch.zeros(q + 1, q + 1)
    S[0, 1:], S[1:, 0], S[1:, 1:] = 1, -1, _jacobsthal(q)
    return S + torch.eye(q + 1)


def _paley_2(q: int) -> Tensor:
    """Order 2(q + 1) for a prime q ≡ 1 mod 4, from a symmetric conference matrix."""
    S = torch.zeros(q + 1, q + 1)
    S[0, 1:], S[1:, 0], S[1:, 1:] = 1, 1, _jacobsthal(q)
    return torch.kron(S, torch.tensor([[1.0, 1], [1, -1]])) + torch.kron(
        torch.eye(q + 1), torch.tensor([[1.0, -1], [-1, -1]])
    )


def _williamson(n: int) -> Tensor:
    m = n // 4
    half = m // 2 + 1

    def circulant(code: str) -> Tensor:
        signs = [1.0 if bit == "1" else -1.0 for bit in f"{int(code, 16):b}".zfill(half)[-half:]]
        row = torch.tensor(signs + signs[:0:-1])  # symmetric: entry i equals entry m − i
        return torch.stack([row.roll(i) for i in range(m)])

    A, B, C, D = map(circulant, WILLIAMSON[n].split())
    rows = [[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]
    return torch.cat([torch.cat(row, 1) for row in rows])
