"""Every number a user can set does what it promises: against ComfyUI's own KSampler, plans and files."""

from pathlib import Path
from typing import Any

import comfy.samplers
import comfy.sd
import folder_paths
import pytest
import torch
from luna_refinement.batching.concepts import Concept, Lora
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.crops import cut
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.batching.noise import row_noise
from luna_refinement.batching.pasting import PasteSettings
from luna_refinement.batching.plan import RefinePlan
from luna_refinement.ip_adapter import LayerWeights
from luna_refinement.nodes.concepts import LunaConcept
from luna_refinement.nodes.ip_adapter import LunaApplyIPAdapter
from luna_refinement.nodes.upscale import LunaNoiseScaffold, LunaPrepUpscale
from luna_refinement.picture.detections import Detection, Detections
from safetensors.torch import save_file
from torch import Tensor

from harness import tiny
from harness.engines import ExactEngine, refine
from harness.refining import Studio, counting, detections, difference, photograph

BOUND = 1e-4
SIDE = 72
WHOLE = (0.0, 0.0, float(SIDE), float(SIDE))
LEFT, RIGHT = (20.0, 180.0, 120.0, 280.0), (380.0, 60.0, 460.0, 140.0)

USUAL = {"seed": 7, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.6}
SAMPLING: list[dict[str, Any]] = [
    {"seed": 8}, {"steps": 5}, {"cfg": 1.0}, {"cfg": 7.0}, {"sampler_name": "heun"}, {"scheduler": "karras"},
    {"denoise": 0.9},
]  # fmt: skip
ANCHORS: list[dict[str, Any]] = [
    {"weight": 0.3}, {"weight": -0.5}, {"start": 0.6}, {"end": 0.6},
    {"layer_weights": LayerWeights("none", (("middle", 1.5),))},
]  # fmt: skip


def only_plan(node: str, seed: int) -> RefinePlan:
    """The plan of a refiner for one picture that is one region, or one tile, at its own size."""
    if node == "chess":
        return plan_tiles(SIDE, SIDE, 1, TileSettings(SIDE, 0.125, 1.0), seed)
    box = detections(torch.zeros(1, SIDE, SIDE, 3), [WHOLE]).items
    return plan_detections(box, SIDE, SIDE, 1, CropSettings(SIDE, 0.0, 0), seed)


def refined(studio: Studio, node: str, **settings: Any) -> Tensor:
    """The picture [1,SIDE,SIDE,3] by a refiner."""
    image = photograph(height=SIDE, width=SIDE)
    if node == "chess":
        return studio.chess(image, tile_size=SIDE, **settings)[0]
    found = detections(image, [WHOLE])
    return studio.detail(image, found, crop_size=SIDE, padding=0.0, feather=0, mask_latent=False, **settings)[0]


def by_ksampler(studio: Studio, node: str, model: Any, settings: dict[str, Any], noise: Tensor | None = None) -> Tensor:
    """The same by ComfyUI's own KSampler."""
    image = photograph(height=SIDE, width=SIDE)
    with torch.inference_mode():
        latent = studio.vae.encode(image)
        if noise is None:
            (region,) = only_plan(node, settings["seed"]).regions
            noise = row_noise([region.seed], latent.shape[1:])
        sampler = comfy.samplers.KSampler(
            model, settings["steps"], torch.device("cpu"), settings["sampler_name"], settings["scheduler"],
            settings["denoise"], model.model_options,
        )  # fmt: skip
        positive, negative = (tiny.conditioning(studio.family, name) for name in ("positive", "negative"))
        sampled = sampler.sample(
            noise, positive, negative, cfg=settings["cfg"], latent_image=latent, disable_pbar=True, seed=1
        )
        return studio.vae.decode(sampled)[..., :3]


@pytest.mark.parametrize("node", ["detail", "chess"])
def test_sampling_settings_do_what_they_do_in_a_ksampler(sd15: Studio, node: str) -> None:
    usual = refined(sd15, node, ip_adapter=None, **USUAL)
    assert difference(usual, by_ksampler(sd15, node, sd15.model, USUAL)) <= BOUND
    for change in SAMPLING:
        settings = USUAL | change
        result = refined(sd15, node, ip_adapter=None, **settings)
        assert difference(result, by_ksampler(sd15, node, sd15.model, settings)) <= BOUND, change
        assert difference(result, usual) > 10 * BOUND, change


@pytest.mark.parametrize("node", ["detail", "chess"])
def test_anchor_settings_do_what_they_do_in_apply_ip_adapter(sd15: Studio, node: str) -> None:
    image = photograph(height=SIDE, width=SIDE)
    usual = refined(sd15, node, ip_adapter_weight=0.8, **USUAL)
    for change in ({"weight": 0.8}, *ANCHORS):
        anchor = {"weight": 0.8, "start": 0.0, "end": 1.0, "scaling": "V only", "row_weights": ""} | change
        with torch.inference_mode():
            model = LunaApplyIPAdapter.execute(
                sd15.model, sd15.plus, clip_vision=sd15.clip_vision, images=image, **anchor
            ).result[0]
        named = {key if key == "layer_weights" else f"ip_adapter_{key}": value for key, value in change.items()}
        result = refined(sd15, node, **({"ip_adapter_weight": 0.8} | named), **USUAL)
        assert difference(result, by_ksampler(sd15, node, model, USUAL)) <= BOUND, change
        if change != {"weight": 0.8}:
            assert difference(result, usual) > 1e-5, change


@pytest.mark.parametrize("node", ["detail", "chess"])
def test_a_noise_scaffold_is_the_noise_of_its_place(sd15: Studio, node: str) -> None:
    scaffold = LunaNoiseScaffold.execute(sd15.vae, 5, 1, SIDE, SIDE).result[0]
    result = refined(sd15, node, ip_adapter=None, noise_scaffold=scaffold, **USUAL)
    wanted = by_ksampler(sd15, node, sd15.model, USUAL, noise=scaffold["samples"])
    assert difference(result, wanted) <= BOUND


def test_each_picture_of_a_batch_takes_its_own_scaffold(sd15: Studio) -> None:
    images = photograph(1, height=SIDE, width=SIDE).repeat(2, 1, 1, 1)
    noises = [LunaNoiseScaffold.execute(sd15.vae, seed, 1, 0, 0, images[:1]).result[0]["samples"] for seed in (5, 6)]
    scaffold = {"samples": torch.cat(noises)}
    both = sd15.chess(images, tile_size=SIDE, noise_scaffold=scaffold, ip_adapter=None)[0]
    for index in (0, 1):
        own = {"samples": scaffold["samples"][index : index + 1]}
        alone = sd15.chess(images[:1], tile_size=SIDE, noise_scaffold=own, ip_adapter=None)[0]
        assert difference(both[index], alone[0]) <= BOUND


CROPS: list[dict[str, Any]] = [
    {}, {"crop_size": 96}, {"padding": 0.6}, {"feather": 24}, {"feather": 0}, {"mask_mode": "box"},
]  # fmt: skip


@pytest.mark.parametrize("change", CROPS, ids=str)
def test_crop_settings_reach_the_plan(sd15: Studio, change: dict[str, Any]) -> None:
    """What the node cuts and pastes is what the plan of these settings says."""
    settings = {"crop_size": 64, "padding": 0.15, "feather": 8, "mask_mode": "mask"} | change
    image = photograph()
    mask = torch.zeros(10, 10)
    mask[2:8, 2:8] = 1
    found = Detections((Detection(0, LEFT, mask=mask),), 512, 512)
    # denoise 0 shows the crops without sampling; the mask of what is pasted needs one step
    steps = {"steps": 1, "ip_adapter": None}
    _, pasted, before, _ = sd15.detail(image, found, **(steps | settings))
    crops = CropSettings(settings["crop_size"], settings["padding"], settings["feather"], settings["mask_mode"])
    (region,) = plan_detections(found.items, 512, 512, 1, crops, seed=7).regions
    box = region.paste
    assert before.shape[1:3] == region.working_size
    assert torch.equal(pasted[0, box.y1 : box.y2, box.x1 : box.x2], region.weights.draw(box))
    assert float(pasted.sum()) == pytest.approx(float(region.weights.draw(box).sum()), rel=1e-5)
    assert difference(before[0], cut(image[0], region.crop, *region.working_size)) < 1e-6


@pytest.mark.parametrize(
    ("change", "tiles"),
    [
        ({}, TileSettings(64, 0.125, 1.0)),
        ({"tile_size": 80}, TileSettings(80, 0.125, 1.0)),
        ({"min_overlap": 0.4}, TileSettings(64, 0.4, 1.0)),
    ],
)
def test_tile_settings_reach_the_plan(sd15: Studio, change: dict[str, Any], tiles: TileSettings) -> None:
    image = photograph(height=128, width=160)
    model, calls = counting(sd15.model)
    settings = {"tile_size": 64, "min_overlap": 0.125, "steps": 1, "ip_adapter": None, "model": model}
    sd15.chess(image, **(settings | change))
    plan = plan_tiles(160, 128, 1, tiles, seed=7)
    assert calls == [2 * len(rows) for rows in plan.passes]


class Replayed(ExactEngine):
    """Gives crops that were refined before."""

    def __init__(self, crops: Tensor) -> None:
        super().__init__(lambda row, latent: crops[row])

    def latents(self, crops: Tensor) -> Tensor:
        return crops

    def decode(self, latents: Tensor) -> Tensor:
        return latents


@pytest.mark.parametrize(("blend", "color_match"), [("feather", "mean_std"), ("multiband", "none")])
def test_paste_settings_reach_the_paste(sd15: Studio, blend: str, color_match: str) -> None:
    image = photograph()
    found = detections(image, [LEFT, RIGHT])
    settings = {"steps": 1, "ip_adapter": None, "feather": 16}
    usual, _, _, crops = sd15.detail(image, found, **settings)
    result = sd15.detail(image, found, blend=blend, color_match=color_match, **settings)[0]
    plan = plan_detections(found.items, 512, 512, 1, CropSettings(64, 0.15, 16), seed=7)
    wanted = refine(image, plan, Replayed(crops), PasteSettings(blend, color_match)).image
    assert difference(result, wanted) < 1e-6
    assert difference(result, usual) > 0.01


def test_the_chess_refiner_matches_colours_too(sd15: Studio) -> None:
    image = photograph(height=SIDE, width=SIDE)
    plain, matched = (
        refined(sd15, "chess", ip_adapter=None, color_match=kind, **USUAL) for kind in ("none", "mean_std")
    )

    def off(result: Tensor) -> float:
        return difference(result.mean(dim=(1, 2)), image.mean(dim=(1, 2)))

    assert off(matched) < 0.02
    assert off(matched) < off(plain) / 2


def test_mask_latent_holds_what_lies_outside_the_mask(sd15: Studio) -> None:
    image = photograph()
    mask = torch.zeros(10, 10)
    mask[:, 5:] = 1
    found = Detections((Detection(0, LEFT, mask=mask),), 512, 512)
    held, free = (
        sd15.detail(image, found, mask_latent=on, ip_adapter=None, feather=0, padding=0.0, denoise=0.9)[3]
        for on in (True, False)
    )
    crop = sd15.detail(image, found, denoise=0.0, feather=0, padding=0.0)[2]
    with torch.inference_mode():
        untouched = sd15.vae.decode(sd15.vae.encode(crop))
    assert difference(held[:, :, :16], untouched[:, :, :16]) < 0.02
    assert difference(free[:, :, :16], untouched[:, :, :16]) > 0.05


def lora_weights(scale: float = 1.0) -> dict[str, Tensor]:
    name = "diffusion_model.output_blocks.11.1.transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(4)
    return {
        f"{name}.lora_up.weight": scale * torch.randn(32, 4, generator=generator),
        f"{name}.lora_down.weight": torch.randn(4, 32, generator=generator),
    }


def test_the_strength_of_a_lora_scales_its_weights(sd15: Studio) -> None:
    image = photograph()
    found = Detections((Detection(0, LEFT, label="face"),), 512, 512)

    def result(lora: Lora | None) -> Tensor:
        return sd15.detail(image, found, concepts=(Concept("face", loras=(lora,) if lora else ()),))[3]

    plain, once, halved, against = (
        result(lora)
        for lora in (
            None,
            Lora("test", lora_weights(3.0), 1.0),
            Lora("test", lora_weights(6.0), 0.5),
            Lora("test", lora_weights(-3.0), -1.0),
        )
    )
    assert difference(once, plain) > 10 * BOUND
    assert difference(once, halved) <= BOUND
    assert difference(once, against) <= BOUND
    assert difference(once, result(Lora("test", lora_weights(3.0), 0.5))) > BOUND


def test_two_loras_act_on_their_own_rows(sd15: Studio) -> None:
    image = photograph()
    found = Detections((Detection(0, LEFT, label="face"), Detection(0, RIGHT, label="hand")), 512, 512)
    loras = [Lora(str(scale), lora_weights(scale), 1.0) for scale in (3.0, -3.0)]
    face, hand = (Concept(name, loras=(lora,)) for name, lora in zip(("face", "hand"), loras, strict=True))
    both = sd15.detail(image, found, concepts=(face, hand))[3]
    assert difference(both[0], sd15.detail(image, found, concepts=(face,))[3][0]) <= BOUND
    assert difference(both[1], sd15.detail(image, found, concepts=(hand,))[3][1]) <= BOUND
    swapped = sd15.detail(image, found, concepts=(Concept("face", loras=(loras[1],)),))[3]
    assert difference(both[0], swapped[0]) > BOUND


def test_nine_rows_of_four_stacks_share_one_call_and_each_is_as_its_own_loader_makes_it(sd15: Studio) -> None:
    image = photograph()
    boxes = [
        (160.0 * (n % 3) + 20, 160.0 * (n // 3) + 20, 160.0 * (n % 3) + 120, 160.0 * (n // 3) + 120) for n in range(9)
    ]
    a, b, c = (Lora(name, lora_weights(scale), 0.8) for name, scale in (("a", 3.0), ("b", -2.0), ("c", 1.5)))
    stacks: dict[str, tuple[Lora, ...]] = {"one": (a,), "two": (a, b), "three": (c, b, a), "none": ()}
    labels = [list(stacks)[n % 4] for n in range(9)]
    found = Detections(
        tuple(Detection(0, box, label=label) for box, label in zip(boxes, labels, strict=True)), 512, 512
    )
    concepts = tuple(Concept(label, loras=stack) for label, stack in stacks.items())
    model, calls = counting(sd15.model)
    together = sd15.detail(image, found, model=model, concepts=concepts, steps=2)[3]
    assert calls == [18, 18]  # two steps of nine rows with both prompts
    for label, stack in stacks.items():
        merged = sd15.model
        for lora in stack:
            merged = comfy.sd.load_lora_for_models(merged, None, lora.weights, lora.strength, 0)[0]
        alone = sd15.detail(image, found, model=merged, steps=2)[3]
        rows = [row for row, own in enumerate(labels) if own == label]
        others = [row for row in range(9) if row not in rows]
        assert difference(together[rows], alone[rows]) <= 1e-5
        assert min(difference(together[row], alone[row]) for row in others) > 5e-5


def test_a_concepts_picture_anchors_its_rows(sd15: Studio) -> None:
    """As the crop itself would, were it that picture: against Apply IP-Adapter on a KSampler."""
    other = photograph(height=256, width=256)[:, 100:190, 60:200]
    with torch.inference_mode():
        middle = other[:, :, 25:115]
        model = LunaApplyIPAdapter.execute(
            sd15.model, sd15.plus, 0.8, 0.0, 1.0, "V only", "", clip_vision=sd15.clip_vision, images=middle
        ).result[0]
    result = refined(sd15, "detail", concepts=(Concept("*", image=other),), **USUAL)
    assert difference(result, by_ksampler(sd15, "detail", model, USUAL)) <= 1e-3
    assert difference(result, refined(sd15, "detail", **USUAL)) > 1e-3


@pytest.fixture
def lora_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    save_file(lora_weights(), tmp_path / "test.safetensors")
    names = {"loras": ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folder_paths.folder_names_and_paths | names)
    return "test.safetensors"


def test_a_concept_node_gives_what_its_inputs_say(lora_file: str) -> None:
    positive, negative = tiny.conditioning(name="a"), tiny.conditioning(name="b")
    picture = torch.rand(1, 8, 8, 3)
    (first,) = LunaConcept.execute("face, ha*", -1.0, -1.0, "none", 1.0).result[0]
    assert (first.ip_adapter_weight, first.denoise, first.loras) == (None, None, ())
    stack = LunaConcept.execute("eye", 0.25, 0.75, lora_file, -1.5, positive, negative, picture, (first,)).result[0]
    assert stack[0] is first
    assert (stack[1].match, stack[1].ip_adapter_weight, stack[1].denoise) == ("eye", 0.25, 0.75)
    assert stack[1].loras[0].strength == -1.5
    assert set(stack[1].loras[0].weights) == set(lora_weights())
    assert stack[1].positive is positive
    assert stack[1].negative is negative
    assert stack[1].image is picture
    assert LunaConcept.execute("eye", 0.0, 0.0, lora_file, 0.0).result[0][0].loras == ()
    assert LunaConcept.execute("eye", 0.0, 0.0, "none", 1.0).result[0][0].denoise == 0


def test_the_first_concept_that_matches_counts(sd15: Studio) -> None:
    image = photograph()
    found = Detections((Detection(0, LEFT, label="Face"),), 512, 512)
    concepts = (Concept("hand", denoise=0.9), Concept("fa*", denoise=0.6), Concept("face", denoise=0.1))
    result = sd15.detail(image, found, concepts=concepts)[3]
    assert difference(result, sd15.detail(image, found, denoise=0.6)[3]) <= BOUND


def test_chunk_size_is_the_most_rows_of_a_call(sd15: Studio) -> None:
    image = photograph()
    for chunk, calls_wanted in ((1, [2, 2, 2]), (2, [4, 2]), (3, [6]), (0, [6])):
        model, calls = counting(sd15.model)
        found = detections(image, [LEFT, RIGHT, (200.0, 200.0, 300.0, 300.0)])
        sd15.detail(image, found, chunk_size=chunk, model=model, steps=1)
        assert calls == calls_wanted


def test_a_scaffold_follows_its_settings(sd15: Studio) -> None:
    def noise(seed: int = 5, octaves: int = 1, width: int = 256, height: int = 128) -> Tensor:
        return LunaNoiseScaffold.execute(sd15.vae, seed, octaves, width, height).result[0]["samples"]

    usual = noise()
    assert usual.shape == (1, 4, 16, 32)
    assert torch.equal(usual, noise())
    assert not torch.equal(usual, noise(seed=6))
    assert noise(width=264, height=136).shape == (1, 4, 17, 33)
    assert noise(width=260).shape == (1, 4, 16, 33)

    def neighbours(samples: Tensor) -> float:
        return float((samples[..., 1:] * samples[..., :-1]).mean() / samples.var())

    alike = [neighbours(noise(octaves=octaves, width=1024, height=1024)) for octaves in (1, 2, 4)]
    assert abs(alike[0]) < 0.02
    assert alike[0] + 0.05 < alike[1] < alike[2] - 0.02
    assert float(noise(octaves=6, width=1024, height=1024).var()) == pytest.approx(1, abs=0.1)
    image = torch.rand(3, 40, 56, 3)
    assert LunaNoiseScaffold.execute(sd15.vae, 5, 1, 0, 0, image).result[0]["samples"].shape == (3, 4, 5, 7)


def test_prep_upscale_follows_its_settings() -> None:
    image = photograph(height=60, width=90)

    def prepared(target: int = 180, method: str = "lanczos", multiple: int = 1) -> Tensor:
        return LunaPrepUpscale.execute(image, target, method, multiple).result[0]

    assert prepared().shape == (1, 120, 180, 3)
    assert prepared(target=360).shape == (1, 240, 360, 3)
    assert prepared(multiple=64).shape == (1, 128, 192, 3)
    results = [prepared(method=method) for method in ("lanczos", "area", "bicubic")]
    assert all(difference(a, b) > 0.01 for a, b in zip(results, results[1:] + results[:1], strict=True))
    # area repeats whole px when a side doubles
    assert torch.equal(results[1][:, ::2, ::2], image)
