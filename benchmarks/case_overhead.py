"""The Semantic Detailer's wall time over the bare sum of its model calls in the same run, and where the rest goes."""

from collections.abc import Sequence
from pathlib import Path

from bench_models import Models, sd15_files
from gpu_clock import now
from luna_refinement.nodes.detailer import LunaSemanticDetailer
from luna_refinement.picture.detections import Detection, Detections
from report import Report, Table, median
from timeline import MODELS, STAGES, Timeline
from torch import Tensor

from harness.refining import photograph

ROWS, CROP, STEPS, REPEATS = 9, 128, 4, 5
WAYS = {"text only": False, "anchored": True}
BESIDE = tuple(stage for stage in STAGES if stage not in MODELS)


def detail(models: Models, image: Tensor, anchored: bool) -> dict[str, float]:
    """Seconds of a run by stage."""
    line = Timeline()
    watched = line.watched(models)
    clip_vision = watched.pop("clip_vision")
    boxes = [(x * 160 + 20.0, y * 160 + 20.0, x * 160 + 140.0, y * 160 + 140.0) for y in range(3) for x in range(3)]
    found = Detections(tuple(Detection(0, box) for box in boxes[:ROWS]), image.shape[2], image.shape[1], 1)
    start = now()
    LunaSemanticDetailer.execute(
        image, found, **watched, positive=models.positive, negative=models.negative,
        seed=1, steps=STEPS, cfg=3.0, sampler_name="euler", scheduler="normal", denoise=0.4,
        crop_size=CROP, padding=0.15, feather=16, mask_mode="mask", chunk_size=0,
        ip_adapter=models.adapter if anchored else None, clip_vision=clip_vision if anchored else None,
    )  # fmt: skip
    return line.stages(start, now())


def run(results: Path) -> Report:
    models = sd15_files()
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for repeat in range(REPEATS + 1):
        image = (photograph() * (1 - 0.01 * repeat)).contiguous()  # new px: embeddings are remembered by content
        for way, anchored in WAYS.items():
            runs[way].append(detail(models, image, anchored))
    whole, beside = [], []
    for way, (_, *measured) in runs.items():  # the first warms up
        seconds = {stage: median([spent.get(stage, 0.0) for spent in measured]) for stage in STAGES}
        total = median([sum(spent.values()) for spent in measured])
        ratios = [sum(spent.values()) / _in_models(spent) for spent in measured]
        whole.append((way, f"{total:.2f}", *(f"{seconds[stage]:.2f}" for stage in MODELS), _spread(ratios)))
        shares = [median([spent.get(stage, 0.0) / sum(spent.values()) for spent in measured]) for stage in BESIDE]
        beside.append((way, *(f"{share:.2%}" for share in shares)))
    about = (
        f"Semantic Detailer on {ROWS} regions at {CROP} px, {STEPS} steps of euler, {models.name}, text alone and with "
        f"a plus adapter, in turns; median of {REPEATS}. The calls are timed inside the same run, at ComfyUI's own "
        "entrances: UNet, vae.encode and vae.decode, clip_vision.encode_image. What lies between two of them is named "
        "by its neighbours; the projection of embeddings counts as the node's own. Target: 1.02 with text alone, 1.03 "
        "anchored."
    )
    calls = ("rows", "node, s", *(f"{stage}, s" for stage in MODELS), "node / calls")
    tables = (
        Table("Wall time over the bare model calls, median (min–max)", calls, tuple(whole)),
        Table("Share of the node's time beside the calls", ("rows", *BESIDE), tuple(beside)),
    )
    return Report("overhead", about, tables)


def _in_models(spent: dict[str, float]) -> float:
    return sum(spent.get(stage, 0.0) for stage in MODELS)


def _spread(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"
