"""What comes before a Chess Refiner: bringing the picture to its size, and noise for all of it."""

from typing import Any

import torch
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..batching.comfy_latents import latent_shape
from ..batching.noise import row_generator
from ..batching.scaffold import pyramid_noise
from ..batching.upscale import UPSCALE_METHODS, UpscaleMethod, fitted_size, scale_image
from ..errors import LunaInputError
from . import inputs
from .checks import check_image, range_notices
from .schema import luna_schema, notice

MOST_STRETCHED = 1.05
"""How far rounding to multiple_of may change a picture's aspect without a word."""


class LunaPrepUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaPrepUpscale",
            display_name="Prep Upscale (Luna)",
            category="Luna/Refine",
            description="Brings a picture to a chosen size for refinement: with an upscale model first, if there is "
            "one, then resampled in floating point.",
            search_aliases=["upscale", "resize", "4k", "esrgan"],
            inputs=[
                io.Image.Input("image", tooltip="The picture or batch to scale."),
                io.UpscaleModel.Input(
                    "upscale_model", optional=True, tooltip="Any upscale model ComfyUI loads; run tile by tile."
                ),
                io.Int.Input(
                    "target_size",
                    default=4096,
                    min=64,
                    max=16384,
                    step=8,
                    tooltip="Longer side of the result in px, rounded to multiple_of.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(UPSCALE_METHODS),
                    default="lanczos",
                    tooltip="How the picture is resampled to that size. area is for scaling down.",
                ),
                io.Int.Input(
                    "multiple_of",
                    default=64,
                    min=1,
                    max=512,
                    tooltip="Both sides are rounded to a multiple of this; 1 keeps the aspect.",
                ),
            ],
            outputs=[io.Image.Output("upscaled_image", display_name="image", tooltip="The picture at its new size.")],
        )

    @classmethod
    def execute(
        cls, image: Tensor, target_size: int, method: UpscaleMethod, multiple_of: int, upscale_model: Any = None
    ) -> io.NodeOutput:
        check_image(image)
        given_width, given_height = image.shape[2], image.shape[1]
        width, height = fitted_size(given_width, given_height, target_size, multiple_of)
        if upscale_model is not None and max(image.shape[1:3]) < max(width, height):
            image = _with_model(upscale_model, image)
        lines = range_notices(image) if image.shape[1:3] != (height, width) else []
        stretched = width * given_height / (height * given_width)
        if not 1 / MOST_STRETCHED <= stretched <= MOST_STRETCHED:
            lines.append(
                f"{given_width}x{given_height} px became {width}x{height} px, stretched by "
                f"{max(stretched, 1 / stretched):.2f}: choose a smaller multiple_of or a larger target_size"
            )
        return io.NodeOutput(scale_image(image, height, width, method), ui=notice(*lines) if lines else None)


def _with_model(upscale_model: Any, image: Tensor) -> Tensor:
    """ComfyUI's own tiled upscale, with its memory handling and progress bar; alpha is resampled beside it."""
    from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel

    node: Any = ImageUpscaleWithModel
    upscale = node.execute if hasattr(node, "execute") else node().upscale
    upscaled = upscale(upscale_model, image[..., :3])[0]
    if image.shape[-1] == 3:
        return upscaled
    alpha = scale_image(image[..., 3:], upscaled.shape[1], upscaled.shape[2], "bicubic")
    return torch.cat([upscaled, alpha.to(upscaled)], dim=-1)


class LunaNoiseScaffold(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaNoiseScaffold",
            display_name="Noise Scaffold (Luna)",
            category="Luna/Refine",
            description="Noise laid out over a whole picture: every tile or crop that reads it gets the same noise for "
            "the same place.",
            search_aliases=["noise", "consistent noise", "pyramid noise"],
            inputs=[
                io.Vae.Input("vae", tooltip="The model's VAE: gives the latent's channels and scale."),
                inputs.seed("Seed of the noise."),
                io.Int.Input(
                    "octaves",
                    default=1,
                    min=1,
                    max=8,
                    tooltip="1 = white noise. More add coarser noise (pyramid noise), which changes larger shapes. "
                    "The variance stays 1.",
                ),
                io.Int.Input(
                    "width", default=4096, min=64, max=16384, step=8, tooltip="Width in px; ignored with image."
                ),
                io.Int.Input(
                    "height", default=4096, min=64, max=16384, step=8, tooltip="Height in px; ignored with image."
                ),
                io.Image.Input("image", optional=True, tooltip="Take size and batch of this picture."),
            ],
            outputs=[
                io.Latent.Output(
                    "noise_scaffold",
                    display_name="noise_scaffold",
                    tooltip="Noise, the same for each picture of a batch.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, vae: VAE, seed: int, octaves: int, width: int, height: int, image: Tensor | None = None
    ) -> io.NodeOutput:
        count = 1
        if image is not None:
            check_image(image)
            count, height, width, _ = image.shape
        ratio = vae.spacial_compression_encode()
        if not isinstance(ratio, int) or getattr(vae, "latent_dim", 2) == 1:
            raise LunaInputError("vae makes no latents of pictures: use the vae of an image model")
        channels, *frames, rows, columns = latent_shape(vae, height, width)
        # the same for every picture, so that each comes out the same by itself and in a batch
        noise = pyramid_noise((channels, rows, columns), octaves, row_generator(seed, "scaffold 0"))
        return io.NodeOutput({"samples": torch.stack([noise] * count).reshape(count, channels, *frames, rows, columns)})


NODES = (LunaPrepUpscale, LunaNoiseScaffold)
