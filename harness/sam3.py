"""A tiny SAM3 with random weights, written to disk in the layout of the published one.

The published folder holds a video model: its ``config.json`` wraps the picture model in ``detector_config``, and the
weights carry the prefix ``detector_model.`` next to those of the tracker.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTokenizer, Sam3Config, Sam3Model, Sam3Processor
from transformers.models.sam3.image_processing_sam3 import Sam3ImageProcessor

IMAGE_PX, PATCH_PX, WIDTH, TOKENS, QUERIES = 56, 14, 32, 32, 6
_START, _END = "<|startoftext|>", "<|endoftext|>"


def tiny_config(vocabulary: int) -> Sam3Config:
    """4 x 4 patches, one or two layers everywhere, 32 channels."""
    heads: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": 2}
    layers = {**heads, "num_layers": 1, "intermediate_size": 64}
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_PX,
        "patch_size": PATCH_PX,
        "pretrain_image_size": IMAGE_PX // 2,
        "window_size": 2,
        "global_attn_indexes": [1],
    }
    side = IMAGE_PX // PATCH_PX
    return Sam3Config(
        vision_config={
            "backbone_config": backbone,
            "fpn_hidden_size": WIDTH,
            "backbone_feature_sizes": [[side * 4] * 2, [side * 2] * 2, [side] * 2],
        },
        text_config=CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=64,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        ).to_dict(),
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config={**layers, "num_queries": QUERIES},
        mask_decoder_config=heads,
    )


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's byte pair encoding without a merge: every letter is a token, its last letter in a word another."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), _START, _END]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=[],
        bos_token=_START,
        eos_token=_END,
        unk_token=_END,
        pad_token=_END,
        model_max_length=TOKENS,
    )


def tiny_model(vocabulary: int, seed: int = 0) -> Sam3Model:
    """Seeded random weights, larger than the usual start so that queries and concepts differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Sam3Model(tiny_config(vocabulary))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def write_tiny_sam3(folder: Path) -> None:
    """Writes config, weights, processor and tokenizer, as they lie in a downloaded folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    size = {"height": IMAGE_PX, "width": IMAGE_PX}
    Sam3Processor(Sam3ImageProcessor(size=size, mask_size=size), tokenizer).save_pretrained(folder)
    model = tiny_model(len(tokenizer))
    config = {
        "architectures": ["Sam3VideoModel"],
        "model_type": "sam3_video",
        "detector_config": model.config.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    weights = {f"detector_model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights["tracker_model.memory"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
