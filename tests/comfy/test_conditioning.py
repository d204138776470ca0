"""Whole-picture conditioning reaches each row as its own part, in as few sampling calls as its structure allows."""

from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import pytest
import torch
from luna_refinement.batching.concepts import Concept, Lora
from luna_refinement.errors import LunaInputError
from luna_refinement.picture.detections import Detection, Detections

from harness import tiny
from harness.engines import groups
from harness.refining import BOXES, Studio, counting, detections, difference, photograph

BOUND = 1e-4
LEFT, RIGHT = (20.0, 180.0, 120.0, 280.0), (380.0, 60.0, 460.0, 140.0)


def with_fields(conds: list[Any], **fields: Any) -> list[Any]:
    return [[text, {**old, **fields}] for text, old in conds]


def labelled(image: torch.Tensor, **boxes: tuple[float, float, float, float]) -> Detections:
    items = tuple(Detection(0, box, label=name) for name, box in boxes.items())
    return Detections(items, image.shape[2], image.shape[1])


def text(name: str, tokens: int = 77) -> list[Any]:
    return tiny.conditioning("sd15", name, tokens)


@pytest.mark.parametrize("by", ["area", "percentage", "mask"])
def test_a_row_sees_only_the_prompts_that_cover_it(sd15: Studio, by: str) -> None:
    image = photograph()
    half = torch.zeros(1, 128, 128)
    half[..., :64] = 1
    left_half, right_half = {
        "area": ({"area": (64, 32, 0, 0)}, {"area": (64, 32, 0, 32)}),
        "percentage": ({"area": ("percentage", 1.0, 0.5, 0, 0)}, {"area": ("percentage", 1.0, 0.5, 0, 0.5)}),
        "mask": ({"mask": half, "mask_strength": 1.0}, {"mask": 1 - half, "mask_strength": 1.0}),
    }[by]
    positive = with_fields(text("left"), **left_half) + with_fields(text("right"), **right_half)
    found = detections(image, [LEFT, RIGHT])
    model, calls = counting(sd15.model)
    both = sd15.detail(image, found, positive=positive, model=model)[3]
    assert sum(calls) == 3 * (2 * 2 + 2)  # three steps: two positives and one negative for two rows
    only_left = sd15.detail(image, found, positive=text("left"))[3]
    only_right = sd15.detail(image, found, positive=text("right"))[3]
    assert difference(both[0], only_left[0]) <= BOUND
    assert difference(both[1], only_right[1]) <= BOUND
    assert difference(only_left[1], only_right[1]) > 10 * BOUND


def test_a_prompt_that_no_row_sees_costs_nothing(sd15: Studio) -> None:
    image = photograph()
    positive = text("everywhere") + with_fields(text("far"), area=(8, 8, 56, 56))
    model, calls = counting(sd15.model)
    with_far = sd15.detail(image, detections(image, [LEFT]), positive=positive, model=model)[3]
    assert sum(calls) == 3 * 2
    assert difference(with_far, sd15.detail(image, detections(image, [LEFT]), positive=text("everywhere"))[3]) == 0


def test_a_row_without_any_prompt_takes_the_first_and_says_so(sd15: Studio, caplog: pytest.LogCaptureFixture) -> None:
    image = photograph()
    far = with_fields(text("far"), area=(8, 8, 56, 56))
    result = sd15.detail(image, detections(image, [LEFT]), positive=far)[3]
    assert difference(result, sd15.detail(image, detections(image, [LEFT]), positive=text("far"))[3]) <= BOUND
    assert "no conditioning covers some regions" in caplog.text


def test_of_several_prompts_that_all_miss_a_row_the_first_counts(sd15: Studio) -> None:
    image = photograph()
    far = with_fields(text("first"), area=(8, 8, 56, 56)) + with_fields(text("second"), area=(8, 8, 48, 56))
    result = sd15.detail(image, detections(image, [LEFT]), positive=far)[3]
    assert difference(result, sd15.detail(image, detections(image, [LEFT]), positive=text("first"))[3]) <= BOUND


def test_texts_of_a_picture_batch_go_to_their_pictures(sd15: Studio) -> None:
    images = photograph(2)
    texts = torch.cat([text("one")[0][0], text("two")[0][0]])
    found = detections(images, [LEFT, RIGHT], on=[0, 1])
    both = sd15.detail(images, found, positive=[[texts, {}]])[3]
    assert difference(both[0], sd15.detail(images, found, positive=text("one"))[3][0]) <= BOUND
    assert difference(both[1], sd15.detail(images, found, positive=text("two"))[3][1]) <= BOUND
    with pytest.raises(LunaInputError, match="positive holds 2 texts"):
        sd15.detail(photograph(3), detections(photograph(3), [LEFT]), positive=[[texts, {}]])


def test_unknown_fields_pass_with_one_warning(sd15: Studio, caplog: pytest.LogCaptureFixture) -> None:
    image = photograph()
    sd15.detail(image, detections(image), positive=with_fields(text("a"), brand_new=3), chunk_size=1)
    assert caplog.text.count("'brand_new' is unknown") == 1


def test_concepts_of_different_length_share_one_call(sd15: Studio) -> None:
    image = photograph()
    found = labelled(image, face=LEFT, hand=RIGHT, other=BOXES[1])
    concepts = (Concept("FACE", positive=text("face", 154)), Concept("ha*", positive=text("hand", 231)))
    model, calls = counting(sd15.model)
    together = sd15.detail(image, found, concepts=concepts, model=model)[3]
    assert sum(calls) == 3 * 2 * 3
    assert len(calls) <= 2 * 3  # ComfyUI may split prompts of very different length, but no row is sampled apart
    alone = [sd15.detail(image, found, positive=text(n, t))[3] for n, t in (("face", 154), ("hand", 231))]
    assert difference(together[0], alone[0][0]) <= BOUND
    assert difference(together[1], alone[1][1]) <= BOUND
    assert difference(together[2], sd15.detail(image, found)[3][2]) <= BOUND


def test_concepts_set_anchor_and_denoise_of_their_rows(sd15: Studio) -> None:
    image = photograph()
    found = labelled(image, face=LEFT, hand=RIGHT)
    plain = sd15.detail(image, found)[3]
    weighted = sd15.detail(image, found, concepts=(Concept("hand", ip_adapter_weight=0.0),))[3]
    assert difference(plain[0], weighted[0]) <= BOUND
    assert difference(weighted[1], sd15.detail(image, found, ip_adapter_weight=0.0)[3][1]) <= BOUND
    stronger = sd15.detail(image, found, concepts=(Concept("hand", denoise=0.6),))[3]
    assert difference(plain[0], stronger[0]) <= BOUND
    assert difference(stronger[1], sd15.detail(image, found, denoise=0.6)[3][1]) <= BOUND
    reference = torch.rand(1, 90, 70, 3)
    referred = sd15.detail(image, found, concepts=(Concept("face", image=reference),))[3]
    assert difference(plain[1], referred[1]) <= BOUND
    assert difference(plain[0], referred[0]) > BOUND


def test_a_lora_acts_on_its_concept_alone_and_leaves_the_model(sd15: Studio) -> None:
    image = photograph()
    found = labelled(image, face=LEFT, hand=RIGHT)
    before = sd15.plain_sample()
    name = "diffusion_model.output_blocks.11.1.transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(4)
    weights = {
        f"{name}.lora_up.weight": torch.randn(32, 4, generator=generator),
        f"{name}.lora_down.weight": torch.randn(4, 32, generator=generator),
    }
    concepts = (Concept("hand", loras=(Lora("test", weights, 2.0),)),)
    plain, changed = sd15.detail(image, found)[3], sd15.detail(image, found, concepts=concepts)[3]
    assert difference(plain[0], changed[0]) <= BOUND
    assert difference(plain[1], changed[1]) > 10 * BOUND
    assert torch.equal(sd15.plain_sample(), before)


def control_net() -> Any:
    """A ControlNet of 32 channels for the tiny SD1.5 UNet; its zero convolutions get weights, so that it acts."""
    config = {
        "image_size": 32, "in_channels": 4, "model_channels": 32, "hint_channels": 3, "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 1, 1, 1], "num_head_channels": 8, "num_heads": -1, "use_spatial_transformer": True,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1, "context_dim": 768,
        "legacy": False, "operations": comfy.ops.manual_cast,
    }  # fmt: skip
    model = comfy.cldm.cldm.ControlNet(**config)
    tiny.seed_weights(model, "tiny control")
    with torch.no_grad():
        for parameter in model.input_hint_block.parameters():
            parameter.mul_(2.5)  # eight random layers would let nothing of the hint through
    cpu = torch.device("cpu")
    return comfy.controlnet.ControlNet(model, load_device=cpu, manual_cast_dtype=torch.float32)


def test_each_row_gets_its_part_of_the_control_hint(sd15: Studio) -> None:
    image = photograph()
    found = detections(image, [LEFT, RIGHT])
    hint = torch.rand((1, 3, 512, 512), generator=torch.Generator().manual_seed(6))

    def refined(hint: torch.Tensor, which: Detections = found, **settings: Any) -> torch.Tensor:
        control = control_net().copy().set_cond_hint(hint, 1.0, (0.0, 1.0))
        fields = {"control": control, "control_apply_to_uncond": False}
        return sd15.detail(image, which, positive=with_fields(text("a"), **fields),
                           negative=with_fields(text("b"), **fields), **settings)[3]  # fmt: skip

    together = refined(hint)
    changed = hint.clone()
    changed[..., 60:140, 380:460] = 0
    moved = refined(changed)
    assert difference(together[0], moved[0]) == 0
    assert difference(together[1], moved[1]) > 10 * BOUND
    assert difference(together, refined(hint, chunk_size=1)) <= BOUND
    assert difference(together[1], refined(hint, detections(image, [RIGHT]))[0]) <= BOUND
    half_size = torch.nn.functional.interpolate(hint, scale_factor=0.5, mode="bilinear", antialias=True)
    assert torch.isfinite(refined(half_size)).all()


def test_each_row_gets_its_part_of_every_hint_of_a_chain(sd15: Studio) -> None:
    image = photograph()
    found = detections(image, [LEFT, RIGHT])
    hint = torch.rand((1, 3, 512, 512), generator=torch.Generator().manual_seed(6))
    changed = hint.clone()
    changed[..., 60:140, 380:460] = 0  # over the right region

    def refined(first: torch.Tensor) -> torch.Tensor:
        control = control_net().copy().set_cond_hint(hint, 1.0, (0.0, 1.0))
        control.set_previous_controlnet(control_net().copy().set_cond_hint(first, 1.0, (0.0, 1.0)))
        fields = {"control": control, "control_apply_to_uncond": True}
        prompts = {name: with_fields(text(name), **fields) for name in ("positive", "negative")}
        return sd15.detail(image, found, **prompts)[3]

    before, after = refined(hint), refined(changed)
    assert difference(before[0], after[0]) == 0
    assert difference(before[1], after[1]) > 10 * BOUND


def test_a_graph_of_everything_keeps_rows_apart(sd15: Studio) -> None:
    """Two chained ControlNets in parts of the schedule, an area, a mask, a part in time and a longer text."""
    image = photograph()
    hints = torch.rand((2, 1, 3, 512, 512), generator=torch.Generator().manual_seed(8))
    first = control_net().copy().set_cond_hint(hints[0], 0.7, (0.0, 0.5))
    second = control_net().copy().set_cond_hint(hints[1], 0.9, (0.2, 1.0))
    second.set_previous_controlnet(first)
    right = torch.zeros(1, 64, 64)
    right[..., 20:] = 1
    positive = [
        *with_fields(text("a"), control=second, control_apply_to_uncond=True),
        *with_fields(text("b", 154), area=(40, 40, 4, 4), strength=0.8),
        *with_fields(text("c"), mask=right, mask_strength=0.7, set_area_to_bounds=True),
        *with_fields(text("d"), start_percent=0.3, end_percent=0.9),
    ]
    settings = {"steps": 5, "denoise": 0.6, "positive": positive}
    together = sd15.detail(image, detections(image), **settings)[3]
    assert difference(together, sd15.detail(image, detections(image), chunk_size=2, **settings)[3]) <= BOUND
    without_control = sd15.detail(image, detections(image), **(settings | {"positive": text("a") + positive[1:]}))[3]
    assert difference(together, without_control) > 10 * BOUND


def test_inpaint_models_see_each_row_with_its_mask_greyed_out(tmp_path: Any) -> None:
    studio = Studio("sd15", tmp_path)
    studio.model = tiny.unet("sd15", extra_channels=5)
    image = photograph()
    found = detections(image, [LEFT, RIGHT])
    shown: list[torch.Tensor] = []

    def record(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        shown.append(arguments["c"]["c_concat"])
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model = studio.model.clone()
    model.set_model_unet_function_wrapper(record)
    together = studio.detail(image, found, model=model)[3]
    masks, pictures = shown[0][:2, :1], shown[0][:2, 1:]
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert difference(pictures[0], pictures[1]) > 0.1
    with torch.inference_mode():
        grey = studio.vae.encode(torch.full((1, 64, 64, 3), 0.5))
    grey = studio.model.model.process_latent_in(grey)[0, :, 4, 4]
    assert difference(pictures[0, :, 4, 4], grey) < 0.05  # the middle of the crop is masked
    assert difference(together, studio.detail(image, found, chunk_size=1)[3]) <= BOUND


def test_gligen_boxes_group_rows_by_what_they_see(sd15: Studio) -> None:
    from luna_refinement.batching.conditioning import RowConditioning
    from luna_refinement.batching.crop_plan import CropSettings, plan_detections
    from luna_refinement.batching.rows import Row

    image = photograph()
    found = detections(image, [LEFT, RIGHT, BOXES[1]])
    plan = plan_detections(found.items, 512, 512, 1, CropSettings(64, 0.0, 0), seed=0)
    # one box over the right region: 8 px units, height, width, y, x
    gligen = ("position", object(), [(torch.zeros(1, 768), 10, 10, 8, 48)])
    shared = {"positive": with_fields(text("a"), gligen=gligen), "negative": text("b")}
    conditioning = RowConditioning(512, 512, 1, cell=8)
    rows = [Row(region, shared) for region in plan.regions]
    assert groups(conditioning, rows, (8, 8)) == [[0, 2], [1]]
    (entry,) = conditioning.for_rows(rows[1:2], (8, 8))["positive"]
    (box,) = entry[1]["gligen"][2]
    # crop 380..460 x 60..140 at 8 latent px for 80 px; box 384..464 x 64..144
    assert box[1:] == pytest.approx((7.6, 7.6, 0.4, 0.4))
    (entry,) = conditioning.for_rows(rows[:1], (8, 8))["positive"]
    assert "gligen" not in entry[1]


def test_reference_latents_of_the_picture_are_cut_and_others_kept(sd15: Studio) -> None:
    from luna_refinement.batching.conditioning import RowConditioning
    from luna_refinement.batching.crop_plan import CropSettings, plan_detections
    from luna_refinement.batching.rows import Row

    image = photograph()
    plan = plan_detections(detections(image, [LEFT, RIGHT]).items, 512, 512, 1, CropSettings(80, 0.0, 0), seed=0)
    own, other = torch.arange(64.0).repeat(1, 4, 64, 1), torch.rand(1, 4, 20, 30)
    shared = {"positive": with_fields(text("a"), reference_latents=[own, other])}
    rows = [Row(region, shared) for region in plan.regions]
    (entry,) = RowConditioning(512, 512, 1, cell=8).for_rows(rows, (10, 10))["positive"]
    cut, kept = entry[1]["reference_latents"]
    assert kept is other
    assert cut.shape == (2, 4, 10, 10)
    assert cut[0].mean() == pytest.approx((LEFT[0] + LEFT[2]) / 16 - 0.5, abs=1)
    assert cut[1].mean() == pytest.approx((RIGHT[0] + RIGHT[2]) / 16 - 0.5, abs=1)
