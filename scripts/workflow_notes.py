"""What the bundled workflows tell a new user: their notes, and where the published models are found."""

_HUB = "https://huggingface.co"

DOWNLOADS = {
    model["name"]: model
    for model in (
        {
            "name": "sd_xl_base_1.0.safetensors",
            "url": f"{_HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
            "directory": "checkpoints",
        },
        {
            "name": "ip-adapter-plus_sdxl_vit-h.safetensors",
            "url": f"{_HUB}/h94/IP-Adapter/resolve/main/sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors",
            "directory": "ipadapter",
        },
        {
            "name": "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
            "url": f"{_HUB}/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors",
            "directory": "clip_vision",
        },
        {
            "name": "lcm_lora_sdxl.safetensors",
            "url": f"{_HUB}/latent-consistency/lcm-lora-sdxl/resolve/main/pytorch_lora_weights.safetensors",
            "directory": "loras",
        },
    )
}
"""File name to what the web page offers to download where the file is missing."""

_MODELS = """\
## Models
Any SDXL or SD1.5 checkpoint works; choose yours in **Models**. The workflow is set to

| file | folder in `models` |
|---|---|
| `sd_xl_base_1.0.safetensors` | `checkpoints` |
| `ip-adapter-plus_sdxl_vit-h.safetensors` | `ipadapter` |
| `CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors` | `clip_vision` |

The last one is published as `model.safetensors`: rename it. For SD1.5 take `ip-adapter-plus_sd15.safetensors` and set \
the sizes to 512. Without an IP-Adapter, delete both loaders.
"""

_LORA_ROW = "| `lcm_lora_sdxl.safetensors` | `loras` |\n"
_FEW_STEP_MODELS = _MODELS.replace("| `ip-adapter-plus_sdxl", f"{_LORA_ROW}| `ip-adapter-plus_sdxl")
"""With the LoRA below the checkpoint."""

_PAINT = """\
1. Load your picture in **Picture**.
2. Right-click it, **Open in MaskEditor**, paint over every thing to refine, save. Things that do not touch are \
refined one by one.
"""

_DEMO_MODELS = """\
## Models
Three small files that the set-up of the demo makes from weights trained on drawn faces. They know nothing else: for \
your own pictures take the templates of this pack.
"""

NOTES = {
    "semantic_detailer": f"""\
# Semantic Detailer
Refines every painted region of a picture, all of them in one sampling call. Each region is anchored by its own \
IP-Adapter embedding, so a face stays that face.

{_PAINT}3. Say in **Prompts** what the regions have in common, then **Run**.

More `denoise` changes more: 0.3 to 0.5 is a good range. Out of memory: set `chunk_size` to 4, the result stays the \
same.

{_MODELS}""",
    "fast_faces": f"""\
# Fast faces
The Semantic Detailer with a fraction of the usual work for each region. All regions share a sampling call with the \
others of their size, and each is anchored by its own IP-Adapter embedding.

{_PAINT}3. Say in **Prompts** what the regions have in common, then **Run**.

| setting | here | usual | work of the UNet |
|---|---|---|---|
| `steps`, with the LoRA | 8 | 20 | 2.5 times less |
| `cfg` | 1 | 6 | 2 times less |
| `crop_size` | 0: automatic | 1024 | 4.3 times less at 512 px, 1.9 at 768 |

At `cfg` 1 the negative prompt has no effect. With another LoRA (Turbo, Lightning, Hyper, DMD2) set `steps`, \
`sampler_name` and `scheduler` to what its author names; without one, take the template `semantic_detailer`. To find \
faces by words, take **Regions** of `sam3_face_detailer`.

Out of memory: set `chunk_size` to 4, the result stays the same.

{_FEW_STEP_MODELS}
The LoRA is published as `pytorch_lora_weights.safetensors` in `latent-consistency/lcm-lora-sdxl`: rename it too. For \
SD1.5 take the one in `latent-consistency/lcm-lora-sdv1-5`.
""",
    "sam3_face_detailer": f"""\
# SAM3 face detailer
Finds what you name, then refines all that is found in one sampling call. Each region is anchored by its own \
IP-Adapter embedding, so a face stays that face.

1. Load your picture in **Picture**.
2. Name what to refine in **Regions**: `face:9, hand` finds at most nine faces, and all hands.
3. Say in **Prompts** what the regions have in common, then **Run**. **What happened** shows what was found.

Too little is found: lower `threshold`. Out of memory: set `chunk_size` to 4, the result stays the same.

{_MODELS}
SAM3 needs the folder `models/sam3/sam3` with the files of `facebook/sam3`; see the help page of the SAM3 Loader.
""",
    "chess_refiner": f"""\
# Chess Refiner
Brings a picture to 4096 px and refines all of it in overlapping tiles: first the even tiles of a chess pattern, then \
the odd ones, which see what became of their neighbours.

1. Load your picture in **Picture**; set `target_size` to the longer side you want.
2. Describe the picture in **Prompts**, then **Run**. **Tile plan** shows the tiles.

Keep `denoise` low: 0.2 to 0.35. Out of memory: set `chunk_size` to 4, the result stays the same.

{_MODELS}""",
    "full_pipeline": f"""\
# Full pipeline
Brings a picture to 4096 px, refines the painted regions, then the whole picture. The Chess Refiner gets the mask of \
what is refined already and changes it less (`refined_strength`).

{_PAINT}3. Set `target_size` to the longer side you want, describe the picture in **Prompts**, then **Run**.

Out of memory: set `chunk_size` of both refiners to 4, the result stays the same.

{_MODELS}""",
    "faces": f"""\
# Nine faces
**Run** brings nine small, noisy, JPEG-compressed faces back, all in one sampling call. Each is anchored by its own \
IP-Adapter embedding: **What happened** shows every crop before and after.

To see what the anchors do, set `ip_adapter_weight` to 0 and run again: nine strangers. `denoise` says how much may \
change.

{_DEMO_MODELS}""",
    "crowd": f"""\
# A crowd, in tiles
**Run** refines the whole picture in overlapping tiles: first the even tiles of a chess pattern in one sampling call, \
then the odd ones, which see what became of their neighbours. Each tile is anchored by its own picture; **Tile plan** \
shows the tiles.

{_DEMO_MODELS}""",
}
"""Markdown of the note in each workflow."""
