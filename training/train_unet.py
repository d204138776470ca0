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
from training.networks import LATENT_CHANNELS, TOKEN_WIDTH, TOKENS, UNET_WIDTH, VAE, ImagePrompt, unet
from training.pictures import SIDE
from training.pool import Pool

ROWS = 16
LATENT_SIDE = SIDE // 8
SIDES = (12, 6, 6, 6, 6, 12, 12)
"""Of the latents at each cross-attention, in the order they run: input, middle, output."""
HINT_HEADS, HINT_OF_PLACES, HINT_OF_CONTENT = 4, 0.06, 0.25  # heads that get hints of places, weights of the losses
LAST_TIMESTEP = 900
"""A refinement at denoise 0.8 starts near timestep 800; pictures out of pure noise are not asked for."""
WITHOUT_ANCHOR, WEAK_ANCHOR, EMPTY_ANCHOR = 0.15, 0.15, 0.04  # shares of the rows
SCHEDULE = Schedule(steps=6600, learning_rate=1.2e-3, warm_up=50, ema=0.997)


class Anchored(torch.nn.Module):
    """The UNet whose cross-attentions read text and image tokens, as IP-Adapter's decoupled attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = unet()
        self.keys = [layer.key for layer in attention_layers(self.unet)]
        self.prompt = ImagePrompt(len(self.keys))

    def forward(
        self, x: Tensor, timesteps: Tensor, text: Tensor, tokens: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The noise in ``x`` [N,4,h,w], and what hints are about.

        These are how far the first heads look from each query's own place (cross-entropy), and what each layer's
        attention takes from the picture, [N,s*s,64].

        Args:
            timesteps: [N].
            text: [N,77,768].
            tokens: [N,64,96] of the anchors.
            weights: [N], strength of each row's anchor.
        """
        pairs = dict(zip(self.keys, self.prompt.keys_values(tokens), strict=True))
        astray: list[Tensor] = []
        taken: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            part, number = options["block"]
            image_k, image_v = pairs[part, number, options["block_index"]]
            heads = options["n_heads"]
            astray.append(_astray(q, image_k, heads))
            image = optimized_attention(q, image_k, image_v, heads)
            taken.append(image)
            return optimized_attention(q, k, v, heads) + weights[:, None, None] * image

        options = {"patches_replace": {"attn2": dict.fromkeys(self.keys, attend)}}
        noise = self.unet(x, timesteps, context=text, transformer_options=options)
        return noise, torch.stack(astray).mean(), taken


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
    readers = Readers()
    trainer = Trainer("unet", {"unet": model.unet, "prompt": model.prompt, "readers": readers}, SCHEDULE, folder)

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
        found, astray, taken = model(noisy, timesteps.float(), text, tokens, weights)
        unread = readers(latents, [tokens, *taken])  # [N]
        return F.mse_loss(found, noise) + HINT_OF_PLACES * astray + HINT_OF_CONTENT * (unread * ~empty).mean()

    trainer.run(loss_at, until)
    trainer.use_mean()
    return trainer


class Readers(torch.nn.Module):
    """Reads the sharp latents around each place from the tokens, and from what every cross-attention takes of them.

    Only training needs it: it teaches the image encoder what to put into the tokens, and the attention what to bring,
    before the UNet has learnt what either is good for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_tokens = _reader(TOKEN_WIDTH, math.isqrt(TOKENS))
        self.of_layers = torch.nn.ModuleList(_reader(UNET_WIDTH, side) for side in SIDES)

    def forward(self, latents: Tensor, found: list[Tensor]) -> Tensor:
        """Mean square of what cannot be read, [N]: of the tokens plus the mean of the layers.

        Args:
            latents: [N,4,24,24], sharp.
            found: the tokens [N,64,96], then each layer's [N,s*s,64].
        """
        readers = [self.of_tokens, *self.of_layers]
        errors = [
            (read(taken) - _by_place(latents, math.isqrt(taken.shape[1]))).square().mean((1, 2))
            for read, taken in zip(readers, found, strict=True)
        ]
        return errors[0] + torch.stack(errors[1:]).mean(0)


def _reader(width: int, side: int) -> torch.nn.Linear:
    return torch.nn.Linear(width, LATENT_CHANNELS * (LATENT_SIDE // side) ** 2)


def _by_place(latents: Tensor, side: int) -> Tensor:
    """[N,4,24,24] as [N,side*side,4*p*p]: the p x p latent px at each place of a grid."""
    part = LATENT_SIDE // side
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
