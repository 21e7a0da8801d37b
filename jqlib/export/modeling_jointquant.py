"""A model that JointQuant exported: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).

Weights stay integer codes in memory and become numbers where they multiply. What runs online (Hadamard transforms, the
rounding of activations and of the KV cache) stands at its module. Rounding is simulated: products are floating point.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseModel


class JointQuantConfig(BaseConfig):
    model_type = "jointquant"


class CodedLinear(nn.Module):
    """weight = codes · scale, one scale for each ``groupsize`` inputs."""

    def __init__(self, plain: nn.Linear, bits: int, groupsize: int):
        super().__init__()
        self.in_features, self.out_features, self.bits = plain.in_features, plain.out_features, bits
        self.groupsize = min(groupsize, self.in_features)
        columns = -(-self.in_features // 2) if bits <= 4 else self.in_features  # two to a byte
        dtype = torch.uint8 if bits <= 4 else torch.int8 if bits <= 8 else torch.int16
        self.register_buffer("codes", torch.zeros(self.out_features, columns, dtype=dtype))
        self.register_buffer("scale", torch.zeros(self.out_features, -(-self.in_features // self.groupsize)))
        self.bias = plain.bias

    @property
    def weight(self) -> Tensor:
        codes = self.codes
        if self.bits <= 4:  # the first in the low half
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, : self.in_features].float() - 8
        scale = self.scale.float().repeat_interleave(self.groupsize, -1)[:, : self.in_features]
        return codes.float() * scale

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype), self.bias)


class Grid(nn.Module):
    """Asymmetric rounding, one grid a token or for each ``groupsize`` channels of it."""

    def __init__(self, bits: int, groupsize: int | None):
        super().__init__()
        self.bits, self.groupsize = bits, groupsize
        self.register_buffer("clip", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.bits >= 16:
            return x
        groups = x.float() if self.groupsize is None else x.float().unflatten(-1, (-1, self.groupsize))
        low = groups.amin(-1, keepdim=True).clamp(max=0) * self.clip.float()
        high = groups.amax(-1, keepdim=True).clamp(min=0) * self.clip.float()
        top = 2**self.bits - 1
        scale = (high - low) / top
        scale = scale.where(scale > 0, 1.0)
        zero = (-low / scale).round()
        codes = ((groups / scale).round() + zero).clamp(0, top) - zero
        return (codes * scale).view(x.shape).to(x.dtype)


class RoundingCache:
    """What attention sees in place of its KV cache, or of none."""

    def __init__(self, cache, grid: Grid, turned):
        self.cache, self.grid, self.turned = cache, grid, turned

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs):
        keys, values = self.turned(self.grid(self.turned(keys.float())), inverse=True).to(keys.dtype), self.grid(values)
        return self.cache.update(keys, values, *args, **kwargs) if self.cache is not None else (keys, values)


class JointQuantForCausalLM(BaseModel):
    config_class = JointQuantConfig
    _keep_in_fp32_modules_strict = ("scale", "clip", "gain")

    def __init__(self, config):
        super().__init__(config)
        about = config.jointquant
        for order in {order for orders in about["hadamard"].values() for order in orders}:
            self.register_buffer(f"hadamard_{order}", torch.zeros(order, order, dtype=torch.int8))
        for name in about["linears"]:
            self.set_submodule(name, CodedLinear(self.get_submodule(name), about["w_bits"], about["w_groupsize"]))
        for name, site in about["sites"].items():
            self._stand(self.get_submodule(name), **site)
        for name in about["attentions"] if about["kv_bits"] < 16 else ():
            attention = self.get_submodule(name)
            attention.kv_grid = Grid(about["kv_bits"], None)
            attention.register_forward_pre_hook(self._behind_a_grid, with_kwargs=True)

    def _stand(self, module: nn.Module, behind: bool, turns: bool, gain: int, bits: int, groupsize: int | None) -> None:
        """Transform and round a module's input, or (``behind``) its output."""
        module.site = Grid(bits, groupsize)
        if gain:
            module.site.register_buffer("gain", torch.ones(gain))

        def run(x: Tensor) -> Tensor:
            z = self.turned(x.float()) if turns else x.float()
            z = z * module.site.gain.float() if gain else z
            return module.site(z).to(x.dtype)

        if behind:
            module.register_forward_hook(lambda module, args, output: run(output))
        else:
            module.register_forward_pre_hook(lambda module, args: (run(args[0]), *args[1:]))

    def _behind_a_grid(self, attention: nn.Module, args, kwargs):
        name = "cache" if "cache" in kwargs else "past_key_values"  # transformers 5.24 has renamed it
        return args, kwargs | {name: RoundingCache(kwargs.get(name), attention.kv_grid, self.turned)}

    def turned(self, x: Tensor, inverse: bool = False) -> Tensor:
        """x H/√n, H the Kronecker product of small Hadamard matrices, or blocks of it."""
        shape, block = x.shape, 1
        for order in reversed(self.config.jointquant["hadamard"][str(shape[-1])]):
            H = getattr(self, f"hadamard_{order}").to(x.dtype) / order**0.5
            H = H.T if inverse else H
            x = x.reshape(-1, order, block)
            x = x.reshape(-1, order) @ H if block == 1 else H.T @ x
            block *= order
        return x.reshape(shape)
