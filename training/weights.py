"""The trained narrow networks as one file in float16: what the repository ships."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = Path(__file__).resolve().parent / "weights" / "faces.safetensors"
PARTS = ("vae", "unet", "prompt")


@dataclass(frozen=True)
class TrainedWeights:
    """State dicts of the narrow networks, float32.

    Attributes:
        vae, unet, prompt: keys as in ``networks.VAE``, ComfyUI's ``UNetModel`` and ``networks.ImagePrompt``.
        latent_deviation: of the VAE's own latents; the UNet works on latents divided by it.
        facts: how they were trained.
    """

    vae: dict[str, Tensor]
    unet: dict[str, Tensor]
    prompt: dict[str, Tensor]
    latent_deviation: float
    facts: dict[str, str]


def read(path: Path = WEIGHTS) -> TrainedWeights:
    """The shipped weights."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        for key in file.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            part, name = key.split(".", 1)
            parts[part][name] = file.get_tensor(key).float()
    return TrainedWeights(**parts, latent_deviation=float(facts["latent_deviation"]), facts=facts)


def write(folder: Path, path: Path = WEIGHTS) -> None:
    """Takes the running means of the checkpoints in ``folder``."""
    from training import train_unet
    from training.loop import Trainer

    vae = train_unet.trained_vae(folder)
    model = train_unet.Anchored()
    modules = {"unet": model.unet, "prompt": model.prompt, "readers": train_unet.Readers()}
    trainer = Trainer("unet", modules, train_unet.SCHEDULE, folder)
    trainer.use_mean()
    parts = {"vae": vae, "unet": model.unet, "prompt": model.prompt}
    tensors = {
        f"{part}.{name}": tensor.detach().to(torch.float16).contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
        if not name.startswith(_UNUSED)
    }
    facts = {
        "latent_deviation": repr(train_unet.latent_deviation(vae)),
        "unet_steps": f"{trainer.step} of {train_unet.SCHEDULE.steps}",
        "unet_loss": f"{trainer.loss:.4f}",
        "torch": torch.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=facts)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB {json.dumps(facts)}")


_UNUSED = ("vision.visual_projection.", "vision.vision_model.post_layernorm.")
"""Of the image encoder's pooled output, which a plus adapter does not read."""
