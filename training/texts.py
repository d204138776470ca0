"""Text conditionings for training: those of the checkpoint's own text encoder, whose weights are seeded, not learnt.

Every training picture gets a random one of them, so that the UNet learns to work with any text rather than to read it.
"""

from pathlib import Path
from typing import Any

import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer
from torch import Tensor

from harness.clip_files import build_clip_text

_WHO = ("", "a face", "a smiling face", "a person", "a cat", "nine faces on a photograph", "portrait of a woman",
        "sharp, detailed", "blurry, low quality", "a yellow face with sunglasses", "an animal", "a crowd")  # fmt: skip
_HOW = ("", ", sharp focus", ", high quality photograph", ", best quality, crisp edges")


def prompts() -> list[str]:
    return [f"{who}{how}" for who in _WHO for how in _HOW]


@torch.no_grad()
def contexts(folder: Path) -> Tensor:
    """[P,77,768], one for each prompt; kept in ``folder``."""
    path = folder / "texts.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    encoder = SD1ClipModel(dtype=torch.float32)
    clip: Any = encoder.clip_l
    clip.transformer.load_state_dict(build_clip_text(), strict=False)
    tokenizer = SD1Tokenizer()
    encoded = [encoder.encode_token_weights(tokenizer.tokenize_with_weights(text))[0] for text in prompts()]
    made = torch.cat([row[:, :77].float() for row in encoded])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(made, path)
    return made
