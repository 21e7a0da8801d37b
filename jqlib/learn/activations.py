"""What flows into the linears: a sample of tokens for the solvers, exact moments for the pictures."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jqlib.fused import fused
from jqlib.model.families import layers_of, site_targets, sites_of
from jqlib.model.walk import removing, walk


@dataclass
class Moments:
    """Power sums of one site over all tokens seen, added up window by window in float64."""

    tokens: int
    sums: Tensor  # (4, features): sum over tokens of x, x², x³, x⁴
    absmax: Tensor  # (features,)

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """``x``: (tokens, features)."""
        *sums, absmax = _power_sums(x)
        return cls(len(x), torch.stack(sums).cpu(), absmax.float().cpu())

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


@fused
def _power_sums(x: Tensor) -> tuple[Tensor, ...]:
    """Of each channel: sums of x, x², x³, x⁴ in float64, and the largest |x|."""
    wide = x.double()
    square = wide * wide
    return wide.sum(0), square.sum(0), (square * wide).sum(0), (square * square).sum(0), x.abs().amax(0)


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

    One walk through the layers with ``calib_data`` (token windows, (windows, seqlen)). Of each module at most
    ``max_tokens`` tokens are kept (None: all), the same ones everywhere, drawn uniformly with ``seed``;
    ``moments``, if given, receives a `Moments` per module over ALL tokens.

    A target that reads a norm (q/k/v, up/gate) gives its input *without the norm's gamma*, fused or
    not, because that is what a rotated model sees; ``raw=True`` gives it as it is. Nothing is clamped.
    ``device``: where the model is already; it is not moved.

    Raises ValueError for an unknown target and FloatingPointError, with the module's name, for NaN or Inf.
    """
    targets = list(targets)
    windows = calib_data if isinstance(calib_data, Tensor) else torch.cat([w.view(-1, w.shape[-1]) for w in calib_data])
    if device is not None and torch.device(device).type != model.device.type:
        raise ValueError(f"device={device!r}, but the model is on {model.device}: move it with model.to({device!r})")
    kept_positions = sampled(windows.numel(), max_tokens, seed)  # bool
    kept: dict[str, list[Tensor]] = {name: [] for name in targets}
    seen = dict.fromkeys(targets, 0)  # tokens
    hosts = _watched(model, targets, raw)

    def record(name: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)  # (tokens, features)
        if not torch.isfinite(x).all():
            raise FloatingPointError(
                f"NaN or Inf in the input of {name}: the model is broken before any quantisation "
                "(try dtype=float32, or check the checkpoint)"
            )
        keep, seen[name] = kept_positions[seen[name] :][: len(x)], seen[name] + len(x)
        kept[name].append(x[keep.to(x.device)].float().cpu())
        if moments is not None:
            batch = Moments.of(x)
            moments[name] = moments[name] + batch if name in moments else batch

    for step in walk(model, windows, "collecting"):
        here = [name for name in targets if name.startswith(f"{step.name}.")]
        handles = [hosts[name][0].register_forward_pre_hook(_recorder(record, name, hosts[name][1])) for name in here]
        with removing(handles):
            step.forward()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def sampled(total: int, count: int | None, seed: int) -> Tensor:
    """Which of ``total`` tokens `collect_activations` keeps: (total,), bool."""
    keep = torch.zeros(total, dtype=torch.bool)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    keep[order[:count]] = True
    return keep


def _watched(model: nn.Module, targets: list[str], raw: bool) -> dict[str, tuple[nn.Module, float | None]]:
    """The module whose input is looked at for each target; and, if that is its norm, the norm's eps."""
    norms = {name: place.norm for place in sites_of(model).values() if place.norm for name in place.linears}
    watched = {}
    for name in targets:
        inside = any(name.startswith(f"{layer}.") for layer, _ in layers_of(model))
        try:
            module = model.get_submodule(name) if inside else None
        except AttributeError:
            module = None
        if module is None:
            raise ValueError(
                f"the model's layers have no module {name!r}. Targets are full names such as "
                f"{site_targets(model)[0]!r}; site_targets(model, 'qkv', 'ug') lists R1's."
            )
        without_gamma = name in norms and not raw
        watched[name] = (norms[name], model.config.rms_norm_eps) if without_gamma else (module, None)
    return watched


def _recorder(record: Callable[[str, Tensor], None], name: str, eps: float | None):
    def hook(module, args):
        x = args[0]
        record(name, x if eps is None else F.rms_norm(x.float(), x.shape[-1:], eps=eps))

    return hook
