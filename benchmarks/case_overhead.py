"""The Semantic Detailer's wall time over the bare sum of its model calls in the same run."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_models import Models, sd15_files
from luna_refinement.nodes.detailer import LunaSemanticDetailer
from luna_refinement.picture.detections import Detection, Detections
from report import Report, Table, median
from torch import Tensor

from harness.refining import photograph

ROWS, CROP, STEPS, REPEATS = 9, 128, 4, 3


class Stopwatch:
    """Adds up the seconds spent inside the functions it wraps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = _now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + _now() - start

        return timed


def timed_models(models: Models, watch: Stopwatch) -> tuple[Any, Any, Any]:
    """Copies of model, VAE and CLIP vision whose calls are timed."""
    apply = watch.around(
        "UNet", lambda apply_model, given: apply_model(given["input"], given["timestep"], **given["c"])
    )
    model = models.model.clone()
    model.set_model_unet_function_wrapper(apply)
    vae = copy.copy(models.vae)
    vae.encode = watch.around("VAE", models.vae.encode)
    vae.decode = watch.around("VAE", models.vae.decode)
    clip_vision = copy.copy(models.clip_vision)
    clip_vision.encode_image = watch.around("CLIP vision", models.clip_vision.encode_image)
    return model, vae, clip_vision


def detail(models: Models, image: Tensor, anchored: bool) -> tuple[float, dict[str, float]]:
    """Seconds of the node, and of its model calls by kind."""
    watch = Stopwatch()
    model, vae, clip_vision = timed_models(models, watch)
    boxes = [(x * 160 + 20.0, y * 160 + 20.0, x * 160 + 140.0, y * 160 + 140.0) for y in range(3) for x in range(3)]
    found = Detections(tuple(Detection(0, box) for box in boxes[:ROWS]), image.shape[2], image.shape[1], 1)
    start = _now()
    LunaSemanticDetailer.execute(
        image, found, model, vae, models.positive, models.negative,
        seed=1, steps=STEPS, cfg=3.0, sampler_name="euler", scheduler="normal", denoise=0.4,
        crop_size=CROP, padding=0.15, feather=16, mask_mode="mask", chunk_size=0,
        ip_adapter=models.adapter if anchored else None, clip_vision=clip_vision if anchored else None,
    )  # fmt: skip
    return _now() - start, watch.seconds


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run(results: Path) -> Report:
    models = sd15_files()
    rows = []
    for anchored in (False, True):
        runs = []
        for repeat in range(REPEATS + 1):
            image = (photograph() * (1 - 0.01 * repeat)).contiguous()  # new px: embeddings are remembered by content
            runs.append(detail(models, image, anchored))
        whole, calls = zip(*runs[1:], strict=True)  # the first warms up
        ratios = [seconds / sum(spent.values()) for seconds, spent in zip(whole, calls, strict=True)]
        kinds = [f"{median([spent.get(kind, 0.0) for spent in calls]):.2f}" for kind in ("UNet", "VAE", "CLIP vision")]
        rows.append(("anchored" if anchored else "text only", f"{median(whole):.2f}", *kinds, f"{median(ratios):.3f}"))
    columns = ("rows", "node, s", "UNet, s", "VAE, s", "CLIP vision, s", "node / calls")
    about = (
        f"Semantic Detailer on {ROWS} regions at {CROP} px, {STEPS} steps of euler, {models.name}, text alone and with "
        f"a plus adapter; median of {REPEATS}. The calls are timed inside the same run, at ComfyUI's own entrances: "
        "UNet, vae.encode and vae.decode, clip_vision.encode_image. The projection of embeddings counts as the "
        "node's own. Target: 1.15."
    )
    return Report("overhead", about, (Table("Wall time over the bare model calls", columns, tuple(rows)),))
