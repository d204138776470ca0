"""Trains UNet, image encoder and adapter together: epsilon prediction, each picture anchored by its degraded self."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_sampling import ModelSamplingDiscrete
from luna_refinement.ip_adapter.layers import attention_layers
from torch import Tensor

from training import texts, train_vae
from training.loop import Schedule, Trainer
from training.networks import LATENT_CHANNELS, TOKEN_WIDTH, TOKENS, VAE, ImagePrompt, unet
from training.pictures import SIDE
from training.pool import Pool

ROWS = 16
LATENT_SIDE = SIDE // 8
HINT_HEADS, HINT_OF_PLACES, HINT_OF_CONTENT = 4, 0.06, 0.25  # heads that get hints, weights of the two losses
LAST_TIMESTEP = 900
"""A refinement at denoise 0.8 starts near timestep 800; pictures out of pure noise are not asked for."""
WITHOUT_ANCHOR, WEAK_ANCHOR, EMPTY_ANCHOR = 0.15, 0.15, 0.04  # shares of the rows
SCHEDULE = Schedule(steps=4500, learning_rate=1.2e-3, warm_up=50, ema=0.997)


class Anchored(torch.nn.Module):
    """The UNet whose cross-attentions read text and image tokens, as IP-Adapter's decoupled attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = unet()
        self.keys = [layer.key for layer in attention_layers(self.unet)]
        self.prompt = ImagePrompt(len(self.keys))

    def forward(
        self, x: Tensor, timesteps: Tensor, text: Tensor, tokens: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The noise in ``x`` [N,4,h,w], and how far the first heads look from each query's own place (cross-entropy).

        Args:
            timesteps: [N].
            text: [N,77,768].
            tokens: [N,64,96] of the anchors.
            weights: [N], strength of each row's anchor.
        """
        pairs = dict(zip(self.keys, self.prompt.keys_values(tokens), strict=True))
        astray: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            part, number = options["block"]
            image_k, image_v = pairs[part, number, options["block_index"]]
            heads = options["n_heads"]
            astray.append(_astray(q, image_k, heads))
            image = optimized_attention(q, image_k, image_v, heads)
            return optimized_attention(q, k, v, heads) + weights[:, None, None] * image

        options = {"patches_replace": {"attn2": dict.fromkeys(self.keys, attend)}}
        noise = self.unet(x, timesteps, context=text, transformer_options=options)
        return noise, torch.stack(astray).mean()


def _astray(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Cross-entropy of the first heads' attention to the tokens around each query's place in the picture.

    ``q`` [N,s*s,C] lies on the UNet's grid of s x s, ``k`` [N,64,C] on the tokens' grid of 8 x 8.
    """
    side, grid = math.isqrt(q.shape[1]), math.isqrt(k.shape[1])
    wanted = F.interpolate(torch.eye(grid**2).view(-1, 1, grid, grid), (side, side), mode="bilinear").flatten(1).T
    q, k = (x.unflatten(-1, (heads, -1))[:, :, :HINT_HEADS].transpose(1, 2) for x in (q, k))
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    return -(wanted * logits.log_softmax(-1)).sum(-1).mean()


def train(folder: Path, until: int | None = None) -> Trainer:
    pool = open_pool(folder)
    torch.manual_seed(1)
    model = Anchored()
    contexts = texts.contexts(folder)
    sigmas: Any = ModelSamplingDiscrete().sigmas
    alphas = sigmas.square().add(1).reciprocal()  # cumulative, [1000]
    nothing = torch.zeros(1, 3, 224, 224)
    reader = content_reader()
    trainer = Trainer("unet", {"unet": model.unet, "prompt": model.prompt, "reader": reader}, SCHEDULE, folder)

    def loss_at(step: int) -> Tensor:
        latents, anchors = pool.batch(step, ROWS)
        generator = torch.Generator().manual_seed(step)

        def chance() -> Tensor:
            return torch.rand(ROWS, generator=generator)

        timesteps = (chance() * LAST_TIMESTEP).long()
        weights = torch.where(chance() < WEAK_ANCHOR, chance(), torch.ones(ROWS))
        weights = torch.where(chance() < WITHOUT_ANCHOR, torch.zeros(ROWS), weights)
        empty = chance() < EMPTY_ANCHOR
        anchors = torch.where(empty[:, None, None, None], nothing, anchors)
        text = contexts[torch.randint(len(contexts), (ROWS,), generator=generator)]
        noise = torch.randn(latents.shape, generator=generator)
        signal = alphas[timesteps][:, None, None, None]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        tokens = model.prompt.tokens(anchors)
        found, astray = model(noisy, timesteps.float(), text, tokens, weights)
        loss = F.mse_loss(found, noise)
        unread = (reader(tokens) - _by_token(latents)).square().mean((1, 2))
        return loss + HINT_OF_PLACES * astray + HINT_OF_CONTENT * (unread * ~empty).mean()

    trainer.run(loss_at, until)
    trainer.use_mean()
    return trainer


def content_reader() -> torch.nn.Linear:
    """Reads the sharp latents around a token's place from the token; only training needs it.

    It teaches the image encoder what to put into the tokens before the UNet has learnt to look at them.
    """
    return torch.nn.Linear(TOKEN_WIDTH, LATENT_CHANNELS * (LATENT_SIDE // math.isqrt(TOKENS)) ** 2)


def _by_token(latents: Tensor) -> Tensor:
    """[N,4,24,24] as [N,64,36]: what lies at each token's place."""
    part = LATENT_SIDE // math.isqrt(TOKENS)
    return F.unfold(latents, part, stride=part).mT


def open_pool(folder: Path) -> Pool:
    """The pool of the trained VAE, whose weights are the running mean."""
    vae = trained_vae(folder)
    return Pool(vae, 1 / latent_deviation(vae), folder / "pool")


def trained_vae(folder: Path) -> VAE:
    vae = VAE()
    trainer = Trainer("vae", {"vae": vae}, train_vae.SCHEDULE, folder)
    if trainer.step < train_vae.SCHEDULE.steps:
        raise SystemExit(f"the VAE has learnt {trainer.step} of {train_vae.SCHEDULE.steps} steps: train it first")
    trainer.use_mean()
    return vae.requires_grad_(False)


@torch.no_grad()
def latent_deviation(vae: VAE) -> float:
    """Of the latents of pictures the VAE has seen; the UNet learns on latents divided by it."""
    return torch.cat([vae.encode(train_vae.parts_at(step)) for step in range(16)]).std().item()
