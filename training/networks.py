"""The narrow networks that are trained, on ComfyUI's own classes, so that widening them gives files it can load.

Import after ComfyUI is on the path and the pack can be imported as ``luna_refinement``.
"""

from collections.abc import Mapping

import torch
from comfy.clip_model import CLIPVisionModelProjection
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ops import disable_weight_init
from comfy.taesd.taesd import Block, Clamp, conv
from luna_refinement.ip_adapter.projection import Resampler
from torch import Tensor, nn

from harness.vae import build_vae

LATENT_CHANNELS = 4
VAE_WIDTH = 32
UNET_WIDTH = 64
TEXT_WIDTH = 768
TOKENS, TOKEN_WIDTH = 64, 96  # of a picture, laid out 8 x 8
RESAMPLER_DEPTH, RESAMPLER_HEADS = 3, 12
VISION_WIDTH, VISION_HEADS, VISION_LAYERS, VISION_PX, PATCH_PX = 64, 4, 3, 224, 14

UNET_CONFIG: dict[str, object] = {
    "image_size": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 1, 1],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": TEXT_WIDTH,
    "num_heads": 8,
    "use_spatial_transformer": True,
    "legacy": False,
}
"""Three levels of one residual block; attention below the first, where a picture of 192 px has 12 x 12 tokens."""

VISION_CONFIG: dict[str, object] = {
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "hidden_size": VISION_WIDTH,
    "intermediate_size": 4 * VISION_WIDTH,
    "image_size": VISION_PX,
    "num_attention_heads": VISION_HEADS,
    "num_channels": 3,
    "num_hidden_layers": VISION_LAYERS,
    "patch_size": PATCH_PX,
    "projection_dim": VISION_WIDTH,
}
"""As ViT-L/14, narrower, and with the layers that learn; the others pass on what they get."""


_LATENT_GAIN = 4.0  # brings the deviation of block means near that of the sampler's noise


class VAE(nn.Module):
    """A TAESD of fewer channels; its own latents, without ComfyUI's scale."""

    def __init__(self, width: int = VAE_WIDTH) -> None:
        super().__init__()

        def stage() -> list[nn.Module]:
            return [conv(width, width, stride=2, bias=False), *(Block(width, width) for _ in range(3))]

        def growth(blocks: int) -> list[nn.Module]:
            grown = [nn.Upsample(scale_factor=2), conv(width, width, bias=False)]
            return [*(Block(width, width) for _ in range(blocks)), *grown]

        self.taesd_encoder = nn.Sequential(
            conv(3, width), Block(width, width), *stage(), *stage(), *stage(), conv(width, LATENT_CHANNELS)
        )
        self.taesd_decoder = nn.Sequential(
            Clamp(), conv(LATENT_CHANNELS, width), nn.ReLU(), *growth(3), *growth(3), *growth(3),
            Block(width, width), conv(width, 3),
        )  # fmt: skip
        initialise(self)
        self._start_from_block_means()

    @torch.no_grad()
    def _start_from_block_means(self) -> None:
        """Starts where latents are mean colours and decoding interpolates them; the other channels start random.

        From random weights alone training finds edges and brightness first, and stays without colours for good.
        """
        known = build_vae(scale_factor=1.0)
        for name, parameter in self.named_parameters():
            if name.endswith("conv.4.weight"):
                parameter.mul_(0.3)  # residual blocks start near nothing
            start = known[name][tuple(slice(0, extent) for extent in parameter.shape)]
            if name in ("taesd_encoder.14.weight", "taesd_decoder.19.weight"):
                parameter.mul_(0.3).add_(start)
                continue
            rows = start.flatten(1).any(1) if start.ndim > 1 else start.ne(0)
            parameter[rows] = start[rows]
        last, first = (self.get_submodule(name) for name in ("taesd_encoder.14", "taesd_decoder.1"))
        for parameter in last.parameters():
            parameter.mul_(_LATENT_GAIN)
        first.get_parameter("weight").div_(_LATENT_GAIN)

    def encode(self, pixels: Tensor) -> Tensor:
        """[N,3,H,W] in 0..1 to [N,4,H/8,W/8]."""
        return self.taesd_encoder(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.taesd_decoder(latents)


class ImagePrompt(nn.Module):
    """Image encoder, resampler and the keys and values of every cross-attention of the UNet."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.vision = CLIPVisionModelProjection(VISION_CONFIG, torch.float32, "cpu", disable_weight_init)
        self.image_proj = Resampler(
            TOKEN_WIDTH, RESAMPLER_DEPTH, RESAMPLER_HEADS, TOKENS, VISION_WIDTH, TOKEN_WIDTH, nn,
            head_dim=TOKEN_WIDTH // RESAMPLER_HEADS,
        )  # fmt: skip
        self.to_k = nn.ModuleList(nn.Linear(TOKEN_WIDTH, UNET_WIDTH, bias=False) for _ in range(layers))
        self.to_v = nn.ModuleList(nn.Linear(TOKEN_WIDTH, UNET_WIDTH, bias=False) for _ in range(layers))
        initialise(self.vision)
        initialise(self.to_k)
        initialise(self.to_v)
        self._tie_tokens_to_places()

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """Preprocessed pictures [N,3,224,224] to tokens [N,64,96]."""
        vision = self.vision.vision_model
        hidden = vision.pre_layrnorm(vision.embeddings(pixel_values))
        for layer in vision.encoder.layers:  # its own forward adds in place, which gradients do not survive
            hidden = hidden + layer.self_attn(layer.layer_norm1(hidden), None, optimized_attention)
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        return self.image_proj(hidden)

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(to_k(tokens), to_v(tokens)) for to_k, to_v in zip(self.to_k, self.to_v, strict=True)]

    @torch.no_grad()
    def _tie_tokens_to_places(self) -> None:
        """Starts every query at its place on an 8 x 8 grid, looking at the patches around it.

        The first channels of the encoder's positions are sines of the place. In the resampler a query holds its place
        in the first channels, a patch in the next ones, so that queries find patches and not one another; left to
        chance, finding the places takes most of the training.
        """
        width = _places(2).shape[1]
        embedding = self.vision.vision_model.embeddings.position_embedding.weight
        embedding.normal_(std=0.1)
        embedding[1:, :width] = _places(VISION_PX // PATCH_PX)
        self.vision.vision_model.embeddings.patch_embedding.weight[:width] = 0
        self.image_proj.latents.normal_(std=0.3)
        self.image_proj.latents[0, :, :width] = _places(round(TOKENS**0.5))
        self.image_proj.latents[0, :, width : 2 * width] = 0
        shift = nn.init.orthogonal_(torch.empty(TOKEN_WIDTH, VISION_WIDTH))
        shift[: 2 * width] = 0
        shift[:, :width] = 0
        shift[range(width, 2 * width), range(width)] = 1
        self.image_proj.proj_in.weight.copy_(shift)
        nn.init.zeros_(self.image_proj.proj_in.bias)
        head = TOKEN_WIDTH // RESAMPLER_HEADS
        for layer in range(RESAMPLER_DEPTH):
            to_q, to_kv = (
                self.image_proj.get_parameter(f"layers.{layer}.0.{name}.weight") for name in ("to_q", "to_kv")
            )
            for weight, place in ((to_q, 0), (to_kv[:TOKEN_WIDTH], width)):
                weight.normal_(std=0.02)
                for first in range(0, TOKEN_WIDTH, head):
                    weight[range(first, first + width), range(place, place + width)] += 1.6


def _places(side: int) -> Tensor:
    """[side*side, 8]: sine and cosine of half a turn and of two turns across the picture, along x and y."""
    centres = (torch.arange(side) + 0.5) / side
    turns = torch.stack([torch.pi * centres, 4 * torch.pi * centres], dim=1)  # [side,2]
    waves = torch.cat([turns.sin(), turns.cos()], dim=1)  # [side,4]
    return torch.cat([waves[None].expand(side, -1, -1), waves[:, None].expand(-1, side, -1)], dim=-1).reshape(-1, 8)


def unet() -> UNetModel:
    network = UNetModel(
        **UNET_CONFIG, model_channels=UNET_WIDTH, dtype=torch.float32, operations=disable_weight_init, device="cpu"
    )
    initialise(network)
    nn.init.zeros_(network.out[2].weight)
    return network


def initialise(module: nn.Module) -> None:
    """Starting weights; ComfyUI's layers leave theirs to the file that is loaded."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(layer.weight, std=0.8 * layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.1)
    for name, parameter in module.named_parameters():
        if name.endswith("class_embedding"):
            nn.init.normal_(parameter, std=0.1)


def parameters_of(modules: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules.values() for parameter in module.parameters()]
