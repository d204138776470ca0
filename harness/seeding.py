"""Seeded weights for models whose layout is real and whose values are made up: no training, no download."""

import zlib

import torch
from torch import Tensor, nn

StateDict = dict[str, Tensor]


def generator_for(*parts: object) -> torch.Generator:
    """A generator whose seed is made of named parts, the same on every machine."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, parts)).encode()))


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of every parameter of a module, which may live on the meta device."""
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def fan_in_scaled(shape: torch.Size, generator: torch.Generator, gain: float = 1.0) -> Tensor:
    """Normal weights with a standard deviation of gain / sqrt(fan in), for Linear [out,in] and Conv [out,in,kh,kw]."""
    fan_in = shape[1:].numel()
    return torch.randn(shape, generator=generator).mul_(gain / fan_in**0.5)


def smooth_conv(shape: torch.Size, generator: torch.Generator, gain: float = 1.0) -> Tensor:
    """Conv weights [out,in,3,3]: a random mix of channels, each blurred by the binomial [1,2,1] kernel."""
    mix = torch.randn(shape[:2], generator=generator).mul_(gain / shape[1] ** 0.5)
    taps = torch.tensor([0.25, 0.5, 0.25])
    return mix[:, :, None, None] * torch.outer(taps, taps)


def to_half(state_dict: StateDict) -> StateDict:
    """Float16 copies, contiguous, as published files hold them; raises ValueError where a value would not be finite."""
    halves = {name: tensor.to(torch.float16).contiguous() for name, tensor in state_dict.items()}
    broken = [name for name, tensor in halves.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"not finite in float16: {broken[:5]}")
    return halves
