"""Trains UNet, image encoder and adapter together: epsilon prediction, each picture anchored by its degraded self."""

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
from training.networks import VAE, ImagePrompt, unet
from training.pool import Pool

ROWS = 16
LAST_TIMESTEP = 900
"""A refinement at denoise 0.8 starts near timestep 800; pictures out of pure noise are not asked for."""
WITHOUT_ANCHOR, WEAK_ANCHOR, EMPTY_ANCHOR = 0.15, 0.15, 0.04  # shares of the rows
SCHEDULE = Schedule(steps=2600, learning_rate=1.2e-3, ema=0.997)


class Anchored(torch.nn.Module):
    """The UNet whose cross-attentions read text and image tokens, as IP-Adapter's decoupled attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = unet()
        self.keys = [layer.key for layer in attention_layers(self.unet)]
        self.prompt = ImagePrompt(len(self.keys))

    def forward(self, x: Tensor, timesteps: Tensor, text: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        """The noise in ``x`` [N,4,h,w].

        Args:
            timesteps: [N].
            text: [N,77,768].
            tokens: [N,64,96] of the anchors.
            weights: [N], strength of each row's anchor.
        """
        pairs = dict(zip(self.keys, self.prompt.keys_values(tokens), strict=True))

        def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            key = (*options["block"], options["block_index"])
            image = optimized_attention(q, *pairs[key], options["n_heads"])
            return optimized_attention(q, k, v, options["n_heads"]) + weights[:, None, None] * image

        options = {"patches_replace": {"attn2": dict.fromkeys(self.keys, attend)}}
        return self.unet(x, timesteps, context=text, transformer_options=options)


def train(folder: Path, until: int | None = None) -> Trainer:
    pool = open_pool(folder)
    torch.manual_seed(1)
    model = Anchored()
    contexts = texts.contexts(folder)
    alphas = ModelSamplingDiscrete().sigmas.square().add(1).reciprocal()  # cumulative, [1000]
    nothing = torch.zeros(1, 3, 224, 224)
    trainer = Trainer("unet", {"unet": model.unet, "prompt": model.prompt}, SCHEDULE, folder)

    def loss_at(step: int) -> Tensor:
        latents, anchors = pool.batch(step, ROWS)
        generator = torch.Generator().manual_seed(step)

        def chance() -> Tensor:
            return torch.rand(ROWS, generator=generator)

        timesteps = (chance() * LAST_TIMESTEP).long()
        weights = torch.where(chance() < WEAK_ANCHOR, chance(), torch.ones(ROWS))
        weights = torch.where(chance() < WITHOUT_ANCHOR, torch.zeros(ROWS), weights)
        anchors = torch.where((chance() < EMPTY_ANCHOR)[:, None, None, None], nothing, anchors)
        text = contexts[torch.randint(len(contexts), (ROWS,), generator=generator)]
        noise = torch.randn(latents.shape, generator=generator)
        signal = alphas[timesteps][:, None, None, None]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        return F.mse_loss(model(noisy, timesteps.float(), text, model.prompt.tokens(anchors), weights), noise)

    trainer.run(loss_at, until)
    trainer.use_mean()
    return trainer


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
