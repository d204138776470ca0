"""SigLIP's pooling head, which ComfyUI's CLIP vision leaves out: one vector of all tokens of a picture."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import LunaInputError
from ..weight_files import weight_fault

_PREFIX = "vision_model.head."
_MARK = "vision_model.post_layernorm.weight"
_NEEDED = (
    "probe",
    *(f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")),
    *(f"{layer}.{part}" for layer in ("layernorm", "mlp.fc1", "mlp.fc2") for part in ("weight", "bias")),
)
POOLING_KEYS = (_MARK, *(_PREFIX + name for name in _NEEDED))
"""What is read of an encoder's file."""

_EPS = 1e-6
"""Of SigLIP's norms."""


class PoolingHead(nn.Module):
    """Attention of one learnt query to the tokens [N,T,D] of the last layer, then an MLP: [N,D].

    Zhai et al. 2023 (SigLIP), as in transformers' ``SiglipVisionModel``, whose ``pooler_output`` it gives.

    Args:
        weights: ``POOLING_KEYS`` of the encoder's file.
        name: of the file, for messages.
        operations: namespace with ``Linear`` and ``LayerNorm``.

    Raises:
        LunaInputError: it is no file of a SigLIP encoder.
    """

    def __init__(self, weights: Mapping[str, Any], name: str, operations: Any = nn) -> None:
        super().__init__()
        dim, hidden = _sizes(weights, name)
        with torch.device("meta"):
            self.probe = nn.Parameter(torch.empty(1, 1, dim))
            self.in_proj = operations.Linear(dim, 3 * dim)
            self.out_proj = operations.Linear(dim, dim)
            self.layernorm = operations.LayerNorm(dim, eps=_EPS)
            self.fc1 = operations.Linear(dim, hidden)
            self.fc2 = operations.Linear(hidden, dim)
        keys = {key: weights[_PREFIX + key] for key in _NEEDED}
        renamed = {
            key.removeprefix("attention.").removeprefix("mlp.").replace("in_proj_", "in_proj."): value
            for key, value in keys.items()
        }
        try:
            self.load_state_dict(renamed, strict=True, assign=True)
        except RuntimeError as error:
            raise LunaInputError(
                f"pooling_file '{name}' holds a pooling head whose weights do not fit together: the file is damaged, "
                f"download it again ({error})"
            ) from error
        self.name = name
        self.mark: Tensor = weights[_MARK]
        self.requires_grad_(False).eval()

    def belongs_to(self, post_layernorm: Tensor) -> bool:
        """Whether the encoder with this last norm [D] was read from the same file."""
        given, own = (x.detach().to("cpu", torch.float32) for x in (post_layernorm, self.mark))
        return given.shape == own.shape and torch.allclose(given, own, rtol=1e-2, atol=1e-3)  # maybe in half precision

    def forward(self, tokens: Tensor, heads: int) -> Tensor:
        q, _, _ = self.in_proj(self.probe.to(tokens).expand(len(tokens), -1, -1)).chunk(3, dim=-1)
        _, k, v = self.in_proj(tokens).chunk(3, dim=-1)
        q, k, v = (rearrange(x, "n t (heads d) -> n heads t d", heads=heads) for x in (q, k, v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        pooled = self.out_proj(rearrange(attended, "n heads t d -> n t (heads d)"))
        inner = nn.functional.gelu(self.fc1(self.layernorm(pooled)), approximate="tanh")
        return (pooled + self.fc2(inner))[:, 0]


def _sizes(weights: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Width of the encoder and of the head's MLP."""
    missing = [key for key in POOLING_KEYS if key not in weights]
    if missing:
        raise LunaInputError(
            f"pooling_file '{name}' lacks {missing[0]}, so it is no SigLIP encoder with its pooling head: choose the "
            "file of siglip-so400m-patch14-384 in models/clip_vision that Load CLIP Vision loads too"
        )
    for key in POOLING_KEYS:
        if fault := weight_fault(weights[key]):
            raise LunaInputError(f"pooling_file '{name}': {key} {fault}: the file is damaged, download it again")
    return weights[_PREFIX + "probe"].shape[-1], weights[_PREFIX + "mlp.fc1.weight"].shape[0]
