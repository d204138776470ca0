"""Flux with image prompts by the published formulas, in float64: what the engine is measured against.

The network is written anew as plain tensor algebra (FLUX.1 in ComfyUI's layout of the weights), with
XLabs' and InstantX' image terms where their authors put them. Nothing is shared with the engine or with ComfyUI but the
weights.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

AXES = (4, 6, 6)
THETA = 10000.0


@dataclass
class ImagePrompts:
    """Keys and values of each row's picture, by the key names of the files.

    Attributes:
        kind: "xlabs" or "instantx".
        weights: of the file.
        tokens: [N,T,4096], of each row.
        weight: [N].
        heads: of the network.
        double: number of its double blocks.
        mask: [N,tokens,1] of the latent's own tokens; text goes by its mean.
    """

    kind: str
    weights: Mapping[str, Tensor]
    tokens: Tensor
    weight: Tensor
    heads: int
    double: int
    mask: Tensor | None = None

    def __call__(self, part: str, number: int, q: Tensor) -> Tensor:
        """What the pictures add [N,tokens,D] to queries [N,heads,tokens,d] of a block of this kind and number."""
        if self.kind == "xlabs":
            stem = f"double_blocks.{number}.processor.ip_adapter_double_stream_"
            k, v = (linear(self.weights, f"{stem}{kind}_proj", self.tokens) for kind in "kv")
        else:
            place = number if part == "double" else self.double + number
            k, v = (linear(self.weights, f"ip_adapter.{place}.to_{kind}_ip", self.tokens) for kind in "kv")
        k, v = (split(x, self.heads) for x in (k, v))
        if self.kind == "instantx":
            k = rms(k, 1e-5)
        added = attend(q, k, v) * self.weight.double()[:, None, None]
        if self.mask is None:
            return added
        text = added.shape[1] - self.mask.shape[1]
        mask = self.mask.double()
        return added * torch.cat((mask.mean(1, keepdim=True).repeat(1, text, 1), mask), dim=1)


def linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    out = x.double() @ weights[f"{name}.weight"].double().T
    bias = weights.get(f"{name}.bias")
    return out if bias is None else out + bias.double()


def split(x: Tensor, heads: int) -> Tensor:
    """[N,tokens,D] → [N,heads,tokens,d]."""
    return torch.stack(x.chunk(heads, dim=-1), dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, heads joined again."""
    out = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v
    return torch.cat(out.unbind(1), dim=-1)


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotate(x: Tensor, places: Tensor) -> Tensor:
    """Turns pairs of numbers of x [N,heads,tokens,d] by the angles of their places [tokens,3]."""
    angles = []
    for axis, width in enumerate(AXES):
        rates = THETA ** (-torch.arange(0, width, 2).double() / width)
        angles.append(places[:, axis, None] * rates)
    turn = torch.polar(torch.ones(()).double(), torch.cat(angles, dim=-1))  # [tokens,d/2]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


class FluxReference:
    """A Flux network in float64.

    Args:
        network: ComfyUI's, for its weights alone.
        heads: of its attention.
    """

    def __init__(self, network: torch.nn.Module, heads: int) -> None:
        self.weights = {key: value.detach().double() for key, value in network.state_dict().items()}
        self.heads = heads

    def count(self, part: str) -> int:
        return len({key.split(".")[1] for key in self.weights if key.startswith(f"{part}_blocks.")})

    def lin(self, name: str, x: Tensor) -> Tensor:
        return linear(self.weights, name, x)

    def embed(self, name: str, x: Tensor) -> Tensor:
        return self.lin(f"{name}.out_layer", silu(self.lin(f"{name}.in_layer", x)))

    def normed(self, name: str, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after their norms, and values, of a joint projection [N,tokens,3D]."""
        q, k, v = (split(x, self.heads) for x in qkv.chunk(3, dim=-1))
        eps = torch.finfo(torch.float32).eps
        scales = [
            self.weights.get(f"{name}.{x}_norm.scale", self.weights.get(f"{name}.{x}_norm.weight"))
            for x in ("query", "key")
        ]
        q, k = (rms(x, eps) * scale for x, scale in zip((q, k), scales, strict=True) if scale is not None)
        return q, k, v

    def velocity(
        self,
        x: Tensor,
        sigma: float,
        prompt: list[Any],
        images: Sequence[ImagePrompts] = (),
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        """What the network says of latents [N,16,h,w] at a noise level."""
        text, fields = prompt[0]
        count, _, height, width = x.shape
        vec = self.embed("time_in", waves(torch.full((count,), sigma)))
        vec = vec + self.embed("guidance_in", waves(torch.full((count,), float(fields["guidance"]))))
        vec = vec + self.embed("vector_in", fields["pooled_output"].double().expand(count, -1))
        txt = self.lin("txt_in", text.double().expand(count, -1, -1))
        tokens, places = zip(*(patched(y, index) for index, y in enumerate((x, *references))), strict=True)
        img = self.lin("img_in", torch.cat(tokens, dim=1))
        own = tokens[0].shape[1]
        where = torch.cat([torch.zeros(txt.shape[1], 3).double(), *places])
        for number in range(self.count("double")):
            img, txt = self.double(number, img, txt, vec, where, own, images)
        joined = torch.cat((txt, img), dim=1)
        for number in range(self.count("single")):
            joined = self.single(number, joined, vec, where, txt.shape[1] + own, images)
        img = joined[:, txt.shape[1] : txt.shape[1] + own]
        shift, scale = self.lin("final_layer.adaLN_modulation.1", silu(vec))[:, None].chunk(2, dim=-1)
        out = self.lin("final_layer.linear", norm(img) * (1 + scale) + shift)
        out = out.reshape(count, height // 2, width // 2, 16, 2, 2)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(count, 16, height, width)

    def double(
        self,
        number: int,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        where: Tensor,
        own: int,
        images: Sequence[ImagePrompts],
    ) -> tuple[Tensor, Tensor]:
        stem = f"double_blocks.{number}."
        streams, mods = {"txt": txt, "img": img}, {}
        q, k, v = {}, {}, {}
        for name, stream in streams.items():
            mods[name] = self.lin(f"{stem}{name}_mod.lin", silu(vec))[:, None].chunk(6, dim=-1)
            shift, scale = mods[name][:2]
            qkv = self.lin(f"{stem}{name}_attn.qkv", norm(stream) * (1 + scale) + shift)
            q[name], k[name], v[name] = self.normed(f"{stem}{name}_attn.norm", qkv)
        joined = [torch.cat(list(x.values()), dim=2) for x in (q, k, v)]
        attended = attend(rotate(joined[0], where), rotate(joined[1], where), joined[2])
        outs = dict(zip(streams, attended.split([txt.shape[1], img.shape[1]], dim=1), strict=True))
        outs["img"], behind = outs["img"].clone(), torch.zeros(())
        for image in images:
            added = image("double", number, q["img"][:, :, :own])
            if image.kind == "instantx":
                outs["img"][:, :own] += added
            else:
                behind = behind + added
        for name in streams:
            _, _, gate, shift, scale, mlp_gate = mods[name]
            x = streams[name] + gate * self.lin(f"{stem}{name}_attn.proj", outs[name])
            hidden = gelu(self.lin(f"{stem}{name}_mlp.0", norm(x) * (1 + scale) + shift), approximate="tanh")
            streams[name] = x + mlp_gate * self.lin(f"{stem}{name}_mlp.2", hidden)
        streams["img"] = torch.cat((streams["img"][:, :own] + behind, streams["img"][:, own:]), dim=1)
        return streams["img"], streams["txt"]

    def single(
        self, number: int, x: Tensor, vec: Tensor, where: Tensor, own: int, images: Sequence[ImagePrompts]
    ) -> Tensor:
        stem, dim = f"single_blocks.{number}.", x.shape[-1]
        shift, scale, gate = self.lin(f"{stem}modulation.lin", silu(vec))[:, None].chunk(3, dim=-1)
        both = self.lin(f"{stem}linear1", norm(x) * (1 + scale) + shift)
        q, k, v = self.normed(f"{stem}norm", both[..., : 3 * dim])
        attended = attend(rotate(q, where), rotate(k, where), v)
        for image in images:
            if image.kind == "instantx":
                attended[:, :own] += image("single", number, q[:, :, :own])
        hidden = gelu(both[..., 3 * dim :], approximate="tanh")
        return x + gate * self.lin(f"{stem}linear2", torch.cat((attended, hidden), dim=-1))


def waves(t: Tensor) -> Tensor:
    """[N] → [N,256], sinusoids of 1000 t."""
    rates = torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    angles = 1000 * t.double()[:, None] * rates
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def patched(x: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Tokens [N,T,64] of squares of 2 x 2, and their places [T,3]."""
    count, channels, height, width = x.shape
    squares = x.double().reshape(count, channels, height // 2, 2, width // 2, 2)
    tokens = squares.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * 4)
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    places = torch.stack((torch.full_like(rows, index), rows, columns), dim=-1).reshape(-1, 3)
    return tokens, places.double()


def euler(
    velocity: Callable[[Tensor, float, str], Tensor], noise: Tensor, sigmas: Sequence[float], cfg: float
) -> Tensor:
    """Samples from noise alone: every step evaluates both prompts by name."""
    x = noise.double() * sigmas[0]
    for sigma, after in itertools.pairwise(sigmas):
        positive = velocity(x, sigma, "positive")
        v = positive if cfg == 1 else velocity(x, sigma, "negative") * (1 - cfg) + cfg * positive
        x = x + v * (after - sigma)
    return x
