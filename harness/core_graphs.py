"""API graphs of ComfyUI's own nodes, to try the small models without this pack."""

from typing import Any

from harness.assets import ASTRONAUT, SD15_CHECKPOINT

SAMPLER, SAVE = "6", "8"


def image_to_image(steps: int = 4, denoise: float = 0.35, side: int = 128, seed: int = 1) -> dict[str, dict[str, Any]]:
    """A photograph through LoadImage, VAE, KSampler and SaveImage."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=SD15_CHECKPOINT.split("/")[1]),
        "2": node("LoadImage", image=ASTRONAUT),
        "3": node("ImageScale", image=["2", 0], upscale_method="area", width=side, height=side, crop="disabled"),
        "4": node("CLIPTextEncode", clip=["1", 1], text="an astronaut"),
        "5": node("VAEEncode", pixels=["3", 0], vae=["1", 2]),
        SAMPLER: node(
            "KSampler", model=["1", 0], positive=["4", 0], negative=["9", 0], latent_image=["5", 0], seed=seed,
            steps=steps, cfg=3.0, sampler_name="euler", scheduler="normal", denoise=denoise,
        ),
        "7": node("VAEDecode", samples=[SAMPLER, 0], vae=["1", 2]),
        SAVE: node("SaveImage", images=["7", 0], filename_prefix="core"),
        "9": node("CLIPTextEncode", clip=["1", 1], text="blurry"),
    }  # fmt: skip
