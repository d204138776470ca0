"""ComfyUI's own SAM3, small and random, runs through the pack's node and gives what the host's own node gives."""

import math
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.supported_models_base import ClipTarget
from luna_refinement.errors import LunaInputError
from luna_refinement.nodes.sam3 import LunaSAM3Detect
from luna_refinement.picture.detections import Detection, Detections
from luna_refinement.picture.masks import single_masks
from luna_refinement.sam3_bridge.comfy_core_sam3 import detect_core
from luna_refinement.sam3_bridge.concepts import Concept, parse_concepts
from luna_refinement.sam3_bridge.sam3_results import arrange

from harness.core_sam3 import QUERIES, small_core_sam3
from harness.refining import Studio

HAS_CORE = hasattr(comfy.model_base, "SAM3")
needs_core = pytest.mark.skipif(not HAS_CORE, reason="this ComfyUI has no SAM3 of its own (0.20 and newer have)")
THRESHOLD = 0.02

Core = tuple[ModelPatcher, Any]


@pytest.fixture(scope="module", params=["SAM3", "SAM31"])
def core(request: pytest.FixtureRequest) -> Core:
    """MODEL and CLIP; SAM 3.1 has other necks and no lowest level of features."""
    return small_core_sam3(request.param)


@pytest.fixture(scope="module")
def sam3_core() -> Core:
    return small_core_sam3("SAM3")


def pictures(count: int = 1, height: int = 120, width: int = 200) -> torch.Tensor:
    coarse = torch.rand(count, 3, 6, 10, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1).movedim(1, -1)


def found(core: Core, concepts: str, image: torch.Tensor, **settings: Any) -> Detections:
    model, clip = core
    settings = {"threshold": THRESHOLD, "nms_iou": 1.0} | settings
    output = LunaSAM3Detect.execute(image=image, concepts=concepts, model=model, clip=clip, **settings)
    detections: Detections = output.args[0]
    return detections


def found_by_the_host(core: Core, words: list[str], image: torch.Tensor) -> list[list[tuple[float, Any, Any]]]:
    """Score, box and mask [H,W] of all that the host's own node finds, for each picture; what has no size is left out.

    Asked for one picture after the other: for a batch its masks do not say which picture they are of.
    """
    from comfy_extras.nodes_sam3 import SAM3_Detect

    import nodes

    model, clip = core
    text = ", ".join(f"{word}:{QUERIES}" for word in words)
    by_picture = []
    with torch.inference_mode():
        conditioning = nodes.CLIPTextEncode().encode(clip, text)[0]
        for picture in image:
            masks, (boxes,) = SAM3_Detect.execute(
                model, picture[None], conditioning, threshold=THRESHOLD, refine_iterations=0, individual_masks=True
            ).args
            by_picture.append(
                [
                    (box["score"], window, mask)
                    for box, mask in zip(boxes, masks, strict=True)
                    if (window := _px(box, mask))
                ]
            )
    return by_picture


def _px(box: dict[str, float], mask: torch.Tensor) -> tuple[int, int, int, int] | None:
    """The whole px a box of the host touches, None where Luna keeps nothing of it."""
    height, width = mask.shape
    x1, y1 = max(box["x"], 0), max(box["y"], 0)
    x2, y2 = min(box["x"] + box["width"], width), min(box["y"] + box["height"], height)
    window = (math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2))
    return window if x1 < x2 and y1 < y2 and mask[window[1] : window[3], window[0] : window[2]].any() else None


def assert_same(ours: list[Detection], theirs: list[tuple[float, Any, Any]]) -> None:
    assert len(ours) == len(theirs) > 0
    for item, (score, window, mask) in zip(ours, theirs, strict=True):
        assert item.score == pytest.approx(score, abs=1e-6)
        assert item.box == window
        assert item.mask is not None
        x1, y1, x2, y2 = window
        assert torch.equal(item.mask, mask[y1:y2, x1:x2])


def clip_of_sd15() -> comfy.sd.CLIP:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    target = ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    return comfy.sd.CLIP(target, model_options={"clip_l_model_config": sizes})


@needs_core
def test_one_concept_is_found_as_by_the_hosts_own_node(core: Core) -> None:
    ours = found(core, "face", pictures())
    assert_same(list(ours), found_by_the_host(core, ["face"], pictures())[0])
    assert {item.label for item in ours} == {"face"}
    assert len({item.box for item in ours}) > 3
    drawn = single_masks(ours)
    assert 0.001 < float(drawn.mean()) < 0.98
    for item, mask in zip(ours, drawn, strict=True):
        x1, y1, x2, y2 = map(int, item.box)
        assert torch.equal(mask[y1:y2, x1:x2], item.mask)


@needs_core
def test_concepts_and_pictures_are_kept_apart_and_labelled(core: Core) -> None:
    image = pictures(2)
    ours = found(core, "face, left hand\neye", image)
    theirs = found_by_the_host(core, ["face", "left hand", "eye"], image)
    for index in range(2):
        assert_same(list(ours.on_image(index)), theirs[index])
        assert_same(list(found(core, "face, left hand, eye", image[index : index + 1])), theirs[index])
    assert {item.label for item in ours} == {"face", "left hand", "eye"}
    by_label = [[item.score for item in ours if item.label == label] for label in ("face", "left hand")]
    assert by_label[0] != by_label[1]
    assert [item.score for item in ours.on_image(0)] != [item.score for item in ours.on_image(1)]


@needs_core
def test_a_limit_keeps_the_best_and_its_number_is_no_word(sam3_core: Core) -> None:
    every = found(sam3_core, "face, hand", pictures())
    limited = found(sam3_core, "face:2, hand ： 1", pictures())
    best = [*[item for item in every if item.label == "face"][:2], next(item for item in every if item.label == "hand")]
    assert [(item.label, item.score, item.box) for item in limited] == [
        (item.label, item.score, item.box) for item in best
    ]
    most = found(sam3_core, "face, hand", pictures(), max_detections=2)
    assert sorted(item.score for item in most) == sorted(item.score for item in every)[-2:]
    assert all(item.score > 0.6 for item in found(sam3_core, "face, hand", pictures(), threshold=0.6))


@needs_core
def test_what_is_left_out_is_cut_from_the_others(sam3_core: Core) -> None:
    faces, gloves = (found(sam3_core, word, pictures(), threshold=0.6) for word in ("face", "glove"))
    left = found(sam3_core, "face, -glove", pictures(), threshold=0.6)
    wanted = arrange([(Concept("face"), faces.items), (Concept("glove", excluded=True), gloves.items)], 1.0, 0)
    assert [(item.label, item.box, item.score) for item in left] == [
        (item.label, item.box, item.score) for item in wanted
    ]
    assert torch.equal(single_masks(left), single_masks(faces.with_items(wanted)))
    assert float(single_masks(left).sum()) < float(single_masks(faces).sum())


@needs_core
def test_overlaps_are_resolved_across_concepts(sam3_core: Core) -> None:
    every = found(sam3_core, "face, hand", pictures())
    fewer = found(sam3_core, "face, hand", pictures(), nms_iou=0.3)
    assert 0 < len(fewer) < len(every)
    assert max(item.score for item in fewer) == max(item.score for item in every)


@needs_core
def test_the_vision_encoder_runs_once_per_picture_for_all_concepts(core: Core) -> None:
    calls: list[int] = []
    trunk = core[0].model.diffusion_model.detector.backbone["vision_backbone"].trunk
    hook = trunk.register_forward_hook(lambda *_: calls.append(1))
    try:
        found(core, "face, hand, eye", pictures(2))
    finally:
        hook.remove()
    assert len(calls) == 2


@needs_core
def test_a_second_run_is_identical_and_leaves_the_model_as_it_was(core: Core) -> None:
    model, clip = core
    weights = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    one, other = (found(core, "face, hand", pictures(2)) for _ in range(2))
    assert [(item.box, item.score, item.label) for item in one] == [
        (item.box, item.score, item.label) for item in other
    ]
    assert torch.equal(single_masks(one), single_masks(other))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.model.state_dict().items())
    assert not model.patches
    assert not model.object_patches
    assert not clip.patcher.patches


@needs_core
def test_memory_is_managed_by_comfyui(sam3_core: Core) -> None:
    before = found(sam3_core, "face", pictures())
    assert any(loaded.model is sam3_core[0] for loaded in comfy.model_management.current_loaded_models)
    comfy.model_management.unload_all_models()
    assert [item.box for item in found(sam3_core, "face", pictures())] == [item.box for item in before]


@needs_core
def test_progress_counts_every_picture_and_concept(sam3_core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    # newer releases pass on no more than ten counts a second
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)
    seen: list[tuple[int, int]] = []
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: seen.append((value, total)))
    try:
        detect_core(*sam3_core, pictures(2), parse_concepts("face, hand"), 0.5)
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    assert [entry for entry in seen if entry[1] == 6] == [(number, 6) for number in range(1, 7)]


@needs_core
@pytest.mark.parametrize(("part", "concepts", "runs"), [("scoring", "face, hand", 1), ("vision", "face", 1)])
def test_cancel_stops_between_concepts_and_pictures(sam3_core: Core, part: str, concepts: str, runs: int) -> None:
    calls: list[int] = []
    detector = sam3_core[0].model.diffusion_model.detector

    def cancel(*_: Any) -> None:
        calls.append(1)
        comfy.model_management.interrupt_current_processing()

    module = detector.dot_prod_scoring if part == "scoring" else detector.backbone["vision_backbone"].trunk
    hook = module.register_forward_hook(cancel)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            detect_core(*sam3_core, pictures(3), parse_concepts(concepts), 0.5)
    finally:
        hook.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls) == runs


@needs_core
def test_nothing_found_is_empty_and_says_so(sam3_core: Core) -> None:
    model, clip = sam3_core
    output = LunaSAM3Detect.execute(
        image=pictures(), concepts="face, hand, -glove", threshold=1.0, model=model, clip=clip
    )
    assert len(output.args[0]) == 0
    assert not output.args[1].any()
    assert "nothing of face, hand was found above a score of 1" in output.ui["text"][-1]


@needs_core
def test_too_long_a_concept_is_named(sam3_core: Core) -> None:
    words = " ".join(["hand"] * 40)
    with pytest.raises(LunaInputError, match=r"concepts: 'hand hand .*is longer than the 32 tokens SAM3 reads"):
        detect_core(*sam3_core, pictures(), [Concept(words)], 0.5)


@needs_core
def test_other_models_are_named(sam3_core: Core, sd15: Studio) -> None:
    model, clip = sam3_core
    with pytest.raises(LunaInputError, match="model is BaseModel, not SAM3: connect MODEL and CLIP"):
        detect_core(sd15.model, clip, pictures(), [Concept("face")], 0.5)
    with pytest.raises(LunaInputError, match="clip is SD1ClipModel, not SAM3's: connect the CLIP of the SAM3 check"):
        detect_core(model, clip_of_sd15(), pictures(), [Concept("face")], 0.5)


@pytest.mark.skipif(HAS_CORE, reason="this ComfyUI has a SAM3 of its own")
def test_an_older_host_is_named(sd15: Studio) -> None:
    with pytest.raises(LunaInputError, match=r"model and clip: core SAM3 needs ComfyUI 0\.20 or newer.*SAM3 Loader"):
        LunaSAM3Detect.execute(image=pictures(), concepts="face", model=sd15.model, clip=clip_of_sd15())


@pytest.mark.parametrize(
    ("connected", "said"),
    [
        ((), "neither sam3 nor model and clip are connected"),
        (("sam3", "model", "clip"), "sam3 is connected and so is model"),
        (("sam3", "clip"), "sam3 is connected and so is clip"),
        (("model",), "model is connected without clip"),
        (("clip",), "clip is connected without model"),
    ],
)
def test_there_must_be_one_source(connected: tuple[str, ...], said: str) -> None:
    with pytest.raises(LunaInputError, match=f"{said}: connect either a SAM3 Loader"):
        LunaSAM3Detect.execute(image=pictures(), concepts="face", **dict.fromkeys(connected, object()))


def test_saved_graphs_keep_their_widgets_in_order() -> None:
    """A saved graph holds the values of its widgets as a list; sockets are found by their names."""
    inputs = LunaSAM3Detect.INPUT_TYPES()
    order = [*inputs["required"], *inputs["optional"]]
    widgets = [name for name in order if name not in ("image", "sam3", "model", "clip")]
    assert widgets == ["concepts", "threshold", "max_detections", "nms_iou"]
    assert list(inputs["required"]) == ["image", "concepts", "threshold", "max_detections"]
    assert list(inputs["optional"]) == ["sam3", "nms_iou", "model", "clip"]
