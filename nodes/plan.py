"""The plan of either refiner, drawn and described without sampling anything."""

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..batching.comfy_chunks import row_bytes, rows_that_fit
from ..batching.comfy_latents import latent_shape
from ..batching.crop_plan import CropSettings, MaskMode, OverlapMode, plan_detections, size_notices
from ..batching.drawing import describe, draw_plan
from ..batching.grid import TILE_ORDERS, TileOrder, TileSettings, plan_tiles
from ..batching.plan import RefinePlan
from ..picture.detections import Detections
from . import inputs
from .checks import check_image, check_models, fitted, latent_cell
from .refiner_inputs import crop_sizes
from .schema import LunaDetections, luna_schema


class LunaRefinePlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return luna_schema(
            node_id="LunaRefinePlan",
            display_name="Refine Plan (Luna)",
            category="Luna/Refine",
            description="Shows what a refiner would do, without sampling: with detections the Semantic Detailer's "
            "crops, without them the Chess Refiner's tiles. Regions of one pass have one colour.",
            search_aliases=["dry run", "preview plan", "tile grid", "crops"],
            inputs=[
                io.Image.Input("image", tooltip="The picture or batch to plan for."),
                io.Model.Input("model", tooltip="The model: tells how much memory a row takes."),
                io.Vae.Input("vae", tooltip="The model's VAE: tells the latent's scale."),
                inputs.steps("Sampling steps of each call."),
                *[_of_the_detailer(given) for given in (*inputs.crop(), inputs.overlap_mode(optional=False))],
                *inputs.tile(feather="tile_feather"),  # the detailer's feather, in px, stands beside it
                io.Combo.Input(
                    "tile_order",
                    options=list(TILE_ORDERS),
                    default="chess",
                    tooltip="chess is what the Chess Refiner does; linear and single are shown for comparison.",
                ),
                inputs.chunk_size("Rows per call; 0 = all that fit."),
                LunaDetections.Input(
                    "detections", optional=True, tooltip="Plan these regions; without it the tiles are planned."
                ),
            ],
            outputs=[
                io.Image.Output("plan", display_name="plan", tooltip="The plan drawn over the picture."),
                io.String.Output("summary", display_name="summary", tooltip="The plan as text."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        model: ModelPatcher,
        vae: VAE,
        steps: int,
        crop_size: int,
        padding: float,
        feather: int,
        mask_mode: MaskMode,
        overlap_mode: OverlapMode,
        tile_size: int,
        min_overlap: float,
        tile_feather: float,
        tile_order: TileOrder,
        chunk_size: int,
        detections: Detections | None = None,
    ) -> io.NodeOutput:
        check_image(image)
        count, height, width, _ = image.shape
        notices: list[str] = []
        if detections is None:
            check_models(model, vae, tile_size)
            tiles = TileSettings(tile_size, min_overlap, tile_feather, tile_order, latent_cell(vae))
            plan = plan_tiles(width, height, count, tiles, seed=0)
        else:
            check_models(model, vae, crop_size)
            sizes = crop_sizes(model, vae)
            crops = CropSettings(crop_size, padding, feather, mask_mode, overlap_mode, latent_cell(vae), sizes)
            plan = plan_detections(fitted(detections, image).items, width, height, count, crops, seed=0)
            notices = size_notices(plan, crops)
        summary = "\n".join([*notices, _summary(plan, model, vae, steps, chunk_size)])
        return io.NodeOutput(draw_plan(image, plan), summary, ui={"text": (summary,)})


def _of_the_detailer(given: Any) -> Any:
    """Refers to the Semantic Detailer, which explains its input."""
    given.tooltip = "As on the Semantic Detailer" + ("; 0 = auto." if given.id == "crop_size" else ".")
    return given


def _summary(plan: RefinePlan, model: ModelPatcher, vae: VAE, steps: int, chunk_size: int) -> str:
    sizes = {region.working_size for region in plan.regions}
    shapes = {size: latent_shape(vae, *size) for size in sizes}
    return describe(
        plan,
        steps,
        {size: chunk_size or rows_that_fit(model, shape) for size, shape in shapes.items()},
        {size: row_bytes(model, shape) for size, shape in shapes.items()},
    )


NODES = (LunaRefinePlan,)
