"""How each pack does a job: its own nodes, called as ComfyUI calls them, with settings that mean the same work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from bench_models import Models
from luna_refinement.batching.concepts import Concept
from luna_refinement.nodes.chess import LunaChessRefiner
from luna_refinement.nodes.detailer import LunaSemanticDetailer
from peer_jobs import BOX, CROP, FEATHER, OVERLAP, PADDING, STRIDE, TILE, WORKING, RegionJob, TileJob
from torch import Tensor

from harness.refining import detections

Run = Callable[[Any, Tensor], Tensor]
"""Refines a picture [1,H,W,3] with a MODEL."""

Nodes = Mapping[str, Any]
WEIGHT = 0.5
ALL_TILES = 4096
"""The largest batch_size that Ultimate SD Upscale offers."""


@dataclass(frozen=True, eq=False)
class Kit:
    """What all sides work with.

    Attributes:
        models: UNet, VAE and so on.
        halves: the adapter's weights as IPAdapter_plus's loader gives them.
        steps: of the sampler.
    """

    models: Models
    halves: dict[str, dict[str, Tensor]]
    steps: int

    @property
    def sampling(self) -> dict[str, Any]:
        """Inputs of the same name on every side."""
        return {
            "vae": self.models.vae,
            "positive": self.models.positive,
            "negative": self.models.negative,
            "seed": 7,
            "steps": self.steps,
            "cfg": 3.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 0.4,
        }


def reference(image: Tensor) -> Tensor:
    """[1,224,224,3]: the one picture that every region of a job with one adapter is shown."""
    return image[:, -224:, -224:]


def luna_regions(kit: Kit, job: RegionJob) -> Run:
    def run(model: Any, image: Tensor) -> Tensor:
        anchored: dict[str, Any] = {}
        if job.anchor != "text only":
            anchored = {"ip_adapter": kit.models.adapter, "clip_vision": kit.models.clip_vision}
            anchored["ip_adapter_weight"] = WEIGHT
        if job.anchor == "one adapter":
            anchored["concepts"] = (Concept("*", image=reference(image)),)
        refined: Tensor = LunaSemanticDetailer.execute(
            image, detections(image, job.boxes), model, **kit.sampling, **anchored,
            crop_size=WORKING, padding=PADDING, feather=FEATHER, mask_mode="mask", chunk_size=0,
        ).result[0]  # fmt: skip
        return refined

    return run


def impact_regions(kit: Kit, job: RegionJob, nodes: Nodes) -> Run:
    """DetailerForEach; the adapter by IPAdapterAdvanced on the model, or by IPAdapterApplySEGS on each segment."""
    segs = _segs(job, nodes)
    pipe = (kit.halves, None, kit.models.clip_vision, None, lambda model: model)

    def run(model: Any, image: Tensor) -> Tensor:
        shown = segs
        if job.anchor == "one adapter":
            model, *_ = nodes["IPAdapterAdvanced"]().apply_ipadapter(
                model, kit.halves, weight=WEIGHT, image=reference(image), clip_vision=kit.models.clip_vision
            )
        elif job.anchor == "own adapter":
            (shown,) = nodes["ImpactIPAdapterApplySEGS"].doit(
                segs, pipe, WEIGHT, noise=0.0, weight_type="linear", start_at=0.0, end_at=1.0, unfold_batch=False,
                faceid_v2=False, weight_v2=1.0, context_crop_factor=1.0, reference_image=image,
            )  # fmt: skip
        refined: Tensor = nodes["DetailerForEach"]().doit(
            image, shown, model, clip=None, **kit.sampling, guide_size=WORKING, guide_size_for=False, max_size=1024,
            feather=FEATHER, noise_mask=True, force_inpaint=True, wildcard="",
        )[0]  # fmt: skip
        return refined

    return run


def _segs(job: RegionJob, nodes: Nodes) -> Any:
    """The job's boxes as Impact's own MaskToSEGS finds them, in the same order."""
    mask = torch.zeros(1, job.side, job.side)
    for x1, y1, x2, y2 in job.boxes:
        mask[:, y1:y2, x1:x2] = 1
    (((height, width), found),) = nodes["MaskToSEGS"].doit(mask, False, CROP / BOX, bbox_fill=True, drop_size=10)
    margin = (CROP - BOX) // 2
    wanted = {(x1 - margin, y1 - margin, x2 + margin, y2 + margin) for x1, y1, x2, y2 in job.boxes}
    got = {tuple(map(int, seg.crop_region)) for seg in found}
    if got != wanted:
        raise RuntimeError(f"peers: Impact Pack would cut {sorted(got)}, Luna {sorted(wanted)}: not the same work")
    return (height, width), found


def luna_tiles(kit: Kit, job: TileJob) -> Run:
    def run(model: Any, image: Tensor) -> Tensor:
        refined: Tensor = LunaChessRefiner.execute(
            image, model, **kit.sampling, tile_size=TILE, min_overlap=OVERLAP, feather=1.0, chunk_size=0
        ).result[0]
        return refined

    return run


def usdu_tiles(kit: Kit, job: TileJob, nodes: Nodes, batch_size: int) -> Run:
    """A tile of STRIDE px with its padding is cut and scaled to TILE px for the UNet."""

    def run(model: Any, image: Tensor) -> Tensor:
        refined: Tensor = nodes["UltimateSDUpscaleNoUpscale"]().upscale(
            image, model, **kit.sampling, mode_type="Chess", tile_width=STRIDE, tile_height=STRIDE, mask_blur=4,
            tile_padding=TILE - STRIDE, seam_fix_mode="None", seam_fix_denoise=1.0, seam_fix_mask_blur=4,
            seam_fix_width=64, seam_fix_padding=16, force_uniform_tiles=True, tiled_decode=False,
            batch_size=batch_size,
        )[0]  # fmt: skip
        return refined

    return run
