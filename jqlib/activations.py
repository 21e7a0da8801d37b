"""What flows into the linears: a sample of tokens for the solvers, exact moments for the pictures."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from jqlib.models import site_targets, sites_of


@dataclass
class Moments:
    """Power sums of one site over all tokens seen, added up window by window in float64."""

    tokens: int
    sums: Tensor  # (4, features): sum over tokens of x, x², x³, x⁴
    absmax: Tensor  # (features,)

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """``x``: (tokens, features)."""
        x = x.double()
        square = x * x
        sums = torch.stack([x.sum(0), square.sum(0), (square * x).sum(0), (square * square).sum(0)])
        return cls(len(x), sums.cpu(), x.abs().amax(0).float().cpu())

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.tokens + other.tokens, self.sums + other.sums, torch.maximum(self.absmax, other.absmax))

    @property
    def rms(self) -> Tensor:
        """Root mean square of each channel over tokens, (features,), float32."""
        return (self.sums[1] / self.tokens).sqrt().float()

    @property
    def kurtosis(self) -> float:
        """E(x−μ)⁴ / (E(x−μ)²)² over all entries of the site; 3 for a Gaussian, 0 where x is constant."""
        m1, m2, m3, m4 = (self.sums.mean(1) / self.tokens).tolist()
        variance = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return fourth / variance**2 if variance > 1e-12 * m2 else 0.0


def collect_activations(
    model: nn.Module,
    calib_data: Tensor | Iterable[Tensor],
    targets: Iterable[str],
    device: str | torch.device | None = None,
    max_tokens: int | None = 2048,
    *,
    raw: bool = False,
    seed: int = 0,
    moments: dict[str, Moments] | None = None,
) -> dict[str, Tensor]:
    """The inputs of the target modules: ``{module name: (tokens, features)}``, float32 on the CPU.

    One forward pass over ``calib_data`` (token windows, (windows, seqlen)). Of each module at most
    ``max_tokens`` tokens are kept (None: all), the same ones everywhere, drawn uniformly with ``seed``;
    ``moments``, when given, receives a `Moments` a module over ALL tokens.

    A target that reads a norm (q/k/v, up/gate) gives its input *without the norm's gamma*, fused or
    not, because that is what a rotated model sees; ``raw=True`` gives it as it is. Nothing is clamped.

    Raises ValueError for an unknown target and FloatingPointError, with the module's name, for NaN or Inf.
    """
    device = device or model.device
    windows = calib_data if isinstance(calib_data, Tensor) else torch.cat([w.view(-1, w.shape[-1]) for w in calib_data])
    kept_positions = sampled(windows.numel(), max_tokens, seed).view(windows.shape)  # bool
    kept: dict[str, list[Tensor]] = {name: [] for name in targets}
    current = {}

    def record(name: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)  # (tokens, features)
        if not torch.isfinite(x).all():
            raise FloatingPointError(
                f"NaN or Inf in the input of {name}: the model is broken before any quantisation "
                "(try dtype=float32, or check the checkpoint)"
            )
        kept[name].append(x[current["keep"].to(x.device)].float().cpu())
        if moments is not None:
            batch = Moments.of(x)
            moments[name] = moments[name] + batch if name in moments else batch

    handles = _hooks(model, list(kept), record, raw)
    try:
        for window, keep in tqdm(zip(windows, kept_positions, strict=True), "collecting", len(windows), unit="window"):
            current["keep"] = keep
            with torch.inference_mode():
                model.base_model(window[None].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def sampled(total: int, wanted: int | None, seed: int) -> Tensor:
    """Which of ``total`` tokens `collect_activations` keeps: (total,), bool."""
    keep = torch.zeros(total, dtype=torch.bool)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    keep[order[:wanted]] = True
    return keep


def _hooks(model: nn.Module, targets: list[str], record, raw: bool) -> list:
    modules = dict(model.named_modules())
    if unknown := [name for name in targets if name not in modules]:
        raise ValueError(
            f"the model has no module {unknown[0]!r}. Targets are full names such as {site_targets(model)[0]!r}; "
            "site_targets(model, 'qkv', 'ug') lists R1's."
        )
    norm_of = {
        f"{layer}.{reader}": f"{layer}.{site.norm}"
        for layer, site in sites_of(model).values() if site.norm for reader in site.readers
    }  # fmt: skip
    handles = []
    for name in targets:
        if name in norm_of and not raw:
            hook = _without_gamma(record, name, model.config.rms_norm_eps)
            handles.append(modules[norm_of[name]].register_forward_pre_hook(hook))
        else:
            handles.append(modules[name].register_forward_pre_hook(lambda _, args, name=name: record(name, args[0])))
    return handles


def _without_gamma(record, name: str, eps: float):
    def hook(norm, args):
        x = args[0].float()
        record(name, F.rms_norm(x, x.shape[-1:], eps=eps))

    return hook
