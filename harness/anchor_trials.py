"""Nine faces at a time through the Semantic Detailer, anchored in five ways, and how near each comes to the truth."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from luna_refinement.ip_adapter import RowEmbeds
from luna_refinement.ip_adapter.comfy_encode import encode_rows
from luna_refinement.ip_adapter.comfy_patch import patch_model
from luna_refinement.nodes.detailer import LunaSemanticDetailer
from luna_refinement.picture.detections import Detection, Detections
from skimage.metrics import structural_similarity
from torch import Tensor

from training import faces, pictures, texts
from training.family import Narrow, narrow

Mode = Literal["own", "one by one", "average", "broadcast", "none"]
MODES: tuple[Mode, ...] = ("own", "average", "broadcast", "none")
FACES = 9


@dataclass(frozen=True, eq=False)
class Group:
    """Nine faces that no training step has seen.

    Attributes:
        truth, degraded: [9,192,192,3] in 0..1.
        number: of the group; noise and prompt follow from it.
    """

    truth: Tensor
    degraded: Tensor
    number: int


def make_group(number: int, alike: bool = False) -> Group:
    """Group ``number``, the same every time; ``alike`` puts all faces at one place on one background."""
    rng = random.Random(f"evidence {number}")
    kinds = rng.sample(faces.kept_out_kinds(), FACES)
    seed = rng.getrandbits(32)
    truth, degraded = [], []
    for place, kind in enumerate(kinds):
        own = random.Random(seed if alike else seed + place)
        sharp = pictures.with_face(rng.choice(kind.texts), own, vary=False)
        truth.append(sharp)
        degraded.append(pictures.degrade(sharp, own))
    sharp_stack, degraded_stack = (pictures.to_tensor(stack).movedim(1, -1).contiguous() for stack in (truth, degraded))
    return Group(sharp_stack, degraded_stack, number)


class Trials:
    """The narrow models and how they are used."""

    _SETTINGS: ClassVar[dict[str, Any]] = {
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "padding": 0.0,
        "feather": 0,
        "mask_mode": "box",
        "mask_latent": False,
    }

    def __init__(self, steps: int = 6) -> None:
        self.steps = steps
        self.folder = Path(mkdtemp())

    @cached_property
    def models(self) -> Narrow:
        return narrow(self.folder)

    @cached_property
    def contexts(self) -> Tensor:
        return texts.contexts(self.folder)

    def refine(self, group: Group, mode: Mode | RowEmbeds, weight: float, denoise: float) -> Tensor:
        """[9,192,192,3]: every picture of the group is one region, one row of one batch.

        Args:
            group: whose degraded pictures are refined.
            mode: which embedding anchors which row, or the embeddings themselves.
            weight: of the anchors.
            denoise: 0..1.
        """
        models = self.models
        anchor = {"ip_adapter": models.adapter, "clip_vision": models.clip_vision, "ip_adapter_weight": weight}
        model = models.model
        if mode in ("average", "broadcast"):
            mode = self._shared(group, averaged=mode == "average")
        if isinstance(mode, RowEmbeds):
            model = patch_model(model, models.adapter, mode, weight=weight)
        prompt = [[self.contexts[group.number % len(self.contexts)][None], {}]]
        side = group.truth.shape[1]
        found = Detections(
            tuple(Detection(place, (0.0, 0.0, float(side), float(side))) for place in range(FACES)), side, side, FACES
        )
        settings = self._SETTINGS | {
            "model": model,
            "vae": models.vae,
            "positive": prompt,
            "negative": prompt,
            "seed": group.number,
            "steps": self.steps,
            "denoise": denoise,
            "crop_size": side,
            "chunk_size": 1 if mode == "one by one" else FACES,
        }
        if mode in ("own", "one by one"):
            settings |= anchor
        with torch.inference_mode():
            return LunaSemanticDetailer.execute(group.degraded, found, **settings).result[0]

    def _shared(self, group: Group, averaged: bool) -> RowEmbeds:
        """The same embedding for every row: the mean of all, or that of the first picture."""
        own = encode_rows(self.models.adapter, self.models.clip_vision, group.degraded)
        one = own.cond.mean(0, keepdim=True) if averaged else own.cond[:1]
        return RowEmbeds(one.expand(len(own), -1, -1).contiguous(), own.uncond, own.projection)


@dataclass(frozen=True)
class Score:
    """How near a picture is to its original.

    Attributes:
        psnr: dB.
        ssim: structural similarity, Gaussian window, mean of the colours.
        edges: correlation of the two pictures' gradients: sharp where it should be.
        itself: whether its own original is the nearest of the group's nine.
    """

    psnr: float
    ssim: float
    edges: float
    itself: float


def distances(results: Tensor, truth: Tensor) -> Tensor:
    """Mean square of what each of [N,H,W,3] results differs by from each original, [N,N]."""
    return (results[:, None] - truth[None]).square().mean((2, 3, 4))


def scores(results: Tensor, truth: Tensor) -> list[Score]:
    """Scores of [N,H,W,3] pictures against their originals."""
    apart = distances(results, truth)
    return [
        Score(
            psnr=float(-10 * apart[k, k].log10()),
            ssim=float(
                structural_similarity(
                    results[k].numpy(), truth[k].numpy(), channel_axis=-1, data_range=1.0, gaussian_weights=True,
                    sigma=1.5, use_sample_covariance=False,
                )
            ),
            edges=_edge_correlation(results[k], truth[k]),
            itself=float(apart[k].argmin() == k),
        )
        for k in range(len(results))
    ]  # fmt: skip


def _edge_correlation(a: Tensor, b: Tensor) -> float:
    def gradients(x: Tensor) -> Tensor:
        return torch.cat([(x[1:] - x[:-1]).flatten(), (x[:, 1:] - x[:, :-1]).flatten()])

    return float(torch.corrcoef(torch.stack([gradients(a), gradients(b)]))[0, 1])


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its 95 % interval by bootstrap over the crops."""
    numbers = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(0)
    means = numbers[rng.integers(0, len(numbers), (draws, len(numbers)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(numbers.mean()), float(low), float(high)
