"""The real transformers SAM3, tiny and random, runs through the pack's loader and nodes inside ComfyUI."""

import json
import shutil
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from luna_refinement.errors import LunaInputError
from luna_refinement.nodes.folders import SAM3_FOLDER
from luna_refinement.nodes.sam3 import LunaSAM3Detect, LunaSAM3Loader
from luna_refinement.sam3_bridge.comfy_sam3 import CONCEPTS_PER_CALL, Sam3, detect, load_sam3, use_half_backbone
from luna_refinement.sam3_bridge.concepts import Concept, parse_concepts
from luna_refinement.sam3_bridge.sam3_files import list_models
from safetensors.torch import load_file, save_file

from harness.sam3 import IMAGE_PX, QUERIES, tiny_config, tiny_model, write_tiny_sam3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("models") / "sam3"
    write_tiny_sam3(path)
    return path


@pytest.fixture(scope="module")
def sam3(folder: Path) -> Sam3:
    return load_sam3(folder)


@pytest.fixture
def models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's models/sam3 leads to the folder with the tiny model."""
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, SAM3_FOLDER, ([str(folder.parent)], known[SAM3_FOLDER][1]))
    return folder.parent


def pictures(count: int = 1, height: int = 120, width: int = 200) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(5))


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_from_words_to_detections_mask_and_preview(models: Path) -> None:
    loaded = LunaSAM3Loader.execute(sam3_model="sam3").args[0]
    output = LunaSAM3Detect.execute(
        image=pictures(2), sam3=loaded, concepts="face, left hand:1\n-glove", threshold=0.05, max_detections=0
    )
    detections, mask, preview = output.args
    assert (detections.width, detections.height, detections.image_count) == (200, 120, 2)
    assert {item.label for item in detections} <= {"face", "left hand"}
    assert {item.image_index for item in detections} == {0, 1}
    for item in detections:
        assert 0.05 < item.score < 1
        assert item.mask is not None
        assert item.mask.shape[0] <= 4 * IMAGE_PX
    for index in range(2):
        found = detections.on_image(index)
        assert sum(item.label == "left hand" for item in found) <= 1
        assert bool(mask[index].any()) == bool(found)
    assert mask.shape == (2, 120, 200)
    assert preview.shape == (2, 120, 200, 3)


def test_boxes_and_scores_are_those_of_transformers_own_pipeline(sam3: Sam3) -> None:
    image = pictures()
    prepared = sam3.processor(
        images=[(image[0] * 255).round().to(torch.uint8).movedim(-1, 0)], text=["face"], return_tensors="pt"
    )
    with torch.inference_mode():
        outputs = sam3.model(
            pixel_values=prepared["pixel_values"],
            input_ids=prepared["input_ids"],
            attention_mask=prepared["attention_mask"],
        )
    (theirs,) = sam3.processor.post_process_instance_segmentation(outputs, threshold=0.05, target_sizes=[(120, 200)])
    ours, notices = detect(sam3, image, [Concept("face")], 0.05, nms_iou=1.0)
    order = theirs["scores"].argsort(descending=True)
    scores, boxes = theirs["scores"][order].tolist(), theirs["boxes"][order].clamp(min=0)
    limit = torch.tensor([200.0, 120.0, 200.0, 120.0])
    wanted = dict(zip([round(score, 4) for score in scores], torch.minimum(boxes, limit).tolist(), strict=True))
    assert len(ours) > 0
    assert len(ours) == len(scores) or "empty" in notices[0]
    for item in ours:
        assert item.box == pytest.approx(wanted[round(item.score, 4)], abs=0.05)


def test_the_vision_encoder_runs_once_per_picture_for_all_concepts(sam3: Sam3) -> None:
    calls: list[int] = []
    text_rows: list[int] = []
    hooks = [
        sam3.model.vision_encoder.register_forward_hook(lambda *_: calls.append(1)),
        sam3.model.detr_encoder.register_forward_hook(
            lambda _module, _args, output: text_rows.append(output.text_features.shape[0])
        ),
    ]
    try:
        detect(sam3, pictures(), parse_concepts("face, hand, eye"), 0.05)
        assert (len(calls), text_rows) == (1, [3])
        calls.clear()
        text_rows.clear()
        many = [Concept(f"thing {number}") for number in range(CONCEPTS_PER_CALL + 2)]
        detect(sam3, pictures(2), many, 0.05)
        assert (len(calls), text_rows) == (2, [CONCEPTS_PER_CALL, 2] * 2)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("others", [2, CONCEPTS_PER_CALL + 1])
def test_a_concept_finds_the_same_alone_and_among_others(sam3: Sam3, others: int) -> None:
    """Within float32 rounding: which concepts share a call is only a matter of speed."""
    group = [*(Concept(f"{number} eyes") for number in range(others)), Concept("hand")]
    alone, _ = detect(sam3, pictures(), [Concept("hand")], 0.05, nms_iou=1.0)
    together, _ = detect(sam3, pictures(), group, 0.05, nms_iou=1.0)
    hands = [item for item in together if item.label == "hand"]
    assert len(hands) == len(alone) > 0
    for one, other in zip(alone, hands, strict=True):
        assert one.box == pytest.approx(other.box, abs=0.02)
        assert one.score == pytest.approx(other.score, abs=1e-4)


def test_limits_and_max_detections(sam3: Sam3) -> None:
    every, _ = detect(sam3, pictures(), parse_concepts("face, hand"), 0.05, nms_iou=1.0)
    assert len(every) > 3
    limited, _ = detect(sam3, pictures(), parse_concepts("face:1, hand:2"), 0.05, nms_iou=1.0)
    assert [item.label for item in limited] == ["face", "hand", "hand"]
    most, _ = detect(sam3, pictures(), parse_concepts("face, hand"), 0.05, max_detections=2, nms_iou=1.0)
    assert sorted(item.score for item in most) == sorted(item.score for item in every)[-2:]
    assert len(every) <= 2 * QUERIES


def test_nothing_found_is_empty_and_says_so(sam3: Sam3) -> None:
    output = LunaSAM3Detect.execute(pictures(), sam3, "face, hand", 0.999, 0)
    assert len(output.args[0]) == 0
    assert not output.args[1].any()
    assert torch.allclose(output.args[2], pictures(), atol=0.003)
    assert "nothing of face, hand was found above a score of 0.999" in output.ui["text"][-1]


def test_alpha_is_not_looked_at(sam3: Sam3) -> None:
    image = pictures()
    with_alpha = torch.cat([image, torch.zeros(1, 120, 200, 1)], dim=-1)
    one, _ = detect(sam3, image, [Concept("face")], 0.05)
    other, _ = detect(sam3, with_alpha, [Concept("face")], 0.05)
    assert [item.box for item in one] == [item.box for item in other]


def test_progress_counts_every_picture_and_call(sam3: Sam3, monkeypatch: pytest.MonkeyPatch) -> None:
    # newer releases pass on no more than ten counts a second
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)
    seen: list[tuple[int, int]] = []
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: seen.append((value, total)))
    try:
        detect(sam3, pictures(2), parse_concepts("face, hand"), 0.05)
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_interrupt_stops_between_pictures(sam3: Sam3) -> None:
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        comfy.model_management.interrupt_current_processing()

    hook = sam3.model.mask_decoder.register_forward_hook(interrupt)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            detect(sam3, pictures(3), [Concept("face")], 0.05)
    finally:
        hook.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls) == 1


def test_a_backbone_in_bfloat16_finds_the_same_things(folder: Path) -> None:
    exact, half = load_sam3(folder), load_sam3(folder)
    use_half_backbone(half.model)
    assert next(half.model.vision_encoder.backbone.parameters()).dtype == torch.bfloat16
    assert all(buffer.dtype != torch.bfloat16 for buffer in half.model.buffers())
    assert half.model.mask_decoder.instance_projection.weight.dtype == torch.float32
    one, _ = detect(exact, pictures(), [Concept("face")], 0.05, nms_iou=1.0)
    other, _ = detect(half, pictures(), [Concept("face")], 0.05, nms_iou=1.0)
    assert len(one) == len(other) > 0
    for item in one:
        nearest = min(other, key=lambda found: abs(found.score - item.score))
        assert nearest.score == pytest.approx(item.score, abs=0.05)


def test_memory_is_managed_by_comfyui(folder: Path) -> None:
    fresh = load_sam3(folder)
    weights = sum(parameter.nbytes for parameter in fresh.model.parameters())
    assert fresh.patcher.model_size() >= weights
    detect(fresh, pictures(), [Concept("face")], 0.5)
    loaded = [model.model for model in comfy.model_management.current_loaded_models]
    assert fresh.patcher in loaded
    comfy.model_management.unload_all_models()
    assert len(detect(fresh, pictures(), [Concept("face")], 0.05)[0]) > 0


def test_too_long_a_concept_is_named(sam3: Sam3) -> None:
    with pytest.raises(LunaInputError, match=r"concepts: 'a very long.*tokens, SAM3 reads 32"):
        detect(sam3, pictures(), [Concept("a very long description of a hand that nobody needs")], 0.5)


@pytest.mark.parametrize("concepts", ["", "  \n", "-hand", ":3"])
def test_empty_concepts_are_named(sam3: Sam3, concepts: str) -> None:
    with pytest.raises(LunaInputError, match="concepts"):
        LunaSAM3Detect.execute(pictures(), sam3, concepts, 0.5, 0)


def test_pictures_that_are_none_are_named(sam3: Sam3) -> None:
    with pytest.raises(LunaInputError, match="image has shape"):
        LunaSAM3Detect.execute(torch.rand(120, 200, 3), sam3, "face", 0.5, 0)


# files


def test_the_loader_lists_folders_and_loose_files(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "mine")
    (tmp_path / "loose.safetensors").write_bytes(b"")
    (tmp_path / "notes").mkdir()
    (tmp_path / "sam3.pt").write_bytes(b"")
    assert list_models([str(tmp_path), str(tmp_path / "nowhere")]) == ["loose.safetensors", "mine"]


@pytest.mark.parametrize("name", ["nothing", "../sam3", ""])
def test_a_name_that_is_not_there_tells_how_to_get_the_weights(models: Path, name: str) -> None:
    with pytest.raises(LunaInputError, match=r"(?s)is not in models/sam3.*gated.*facebook/sam3.*hf auth login"):
        LunaSAM3Loader.execute(sam3_model=name)


def test_a_graph_with_a_missing_model_is_refused_with_the_steps(models: Path) -> None:
    assert LunaSAM3Loader.validate_inputs(sam3_model="sam3") is True
    assert "hf download facebook/sam3" in str(LunaSAM3Loader.validate_inputs(sam3_model="sam3_large"))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_names_it(folder: Path, tmp_path: Path, missing: str) -> None:
    broken = copy_of(folder, tmp_path)
    (broken / missing).unlink()
    with pytest.raises(LunaInputError, match=f"sam3_model 'copy' lacks {missing}.*gated"):
        load_sam3(broken)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ('{"model_type": "clip"}', "type 'clip', not SAM3"),
        ("{}", "type 'None', not SAM3"),
        ("[]", "holds no settings"),
        ('{"model_type": ', "cannot be read"),
    ],
)
def test_a_folder_of_another_model_is_refused(folder: Path, tmp_path: Path, config: str, wanted: str) -> None:
    broken = copy_of(folder, tmp_path)
    (broken / "config.json").write_text(config)
    with pytest.raises(LunaInputError, match=wanted):
        load_sam3(broken)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_named(folder: Path, tmp_path: Path, share: float) -> None:
    broken = copy_of(folder, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(LunaInputError, match="sam3_model 'copy': the weights are damaged or not downloaded to the end"):
        load_sam3(broken)


def test_missing_weights_are_an_error_and_not_random(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["detector_model.mask_decoder.instance_projection.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LunaInputError, match=r"1 weights are missing.*mask_decoder\.instance_projection\.weight"):
        load_sam3(broken)


def test_weights_of_another_size_are_an_error(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path)
    config = json.loads((broken / "config.json").read_text())
    config["detector_config"]["detr_decoder_config"]["num_queries"] = QUERIES + 1
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(LunaInputError, match="sam3_model 'copy' cannot be loaded: its files do not fit each other"):
        load_sam3(broken)


def test_a_picture_model_without_the_video_wrapping_loads(folder: Path, tmp_path: Path) -> None:
    """What save_pretrained of transformers' Sam3Model writes."""
    plain = copy_of(folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())["detector_config"]
    tiny_model(config["text_config"]["vocab_size"]).save_pretrained(plain)
    one, _ = detect(load_sam3(plain), pictures(), [Concept("face")], 0.05)
    other, _ = detect(load_sam3(folder), pictures(), [Concept("face")], 0.05)
    assert [item.box for item in one] == [item.box for item in other]


CLIP_WORDS = 49408


def test_a_loose_file_loads_with_the_published_processor(tmp_path: Path) -> None:
    """Only the architecture is small: the way the file goes, and its processor, are the published model's."""
    path = tmp_path / "loose.safetensors"
    model = tiny_model(CLIP_WORDS)
    save_file({f"detector_model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    loaded = load_sam3(path, tiny_config(CLIP_WORDS))
    assert loaded.processor.tokenizer("face")["input_ids"] == [49406, 1710, 49407]
    size = loaded.processor.image_processor.size
    assert (size["height"], size["width"]) == (1008, 1008)
    assert torch.equal(
        loaded.model.mask_decoder.instance_projection.weight, model.mask_decoder.instance_projection.weight
    )


def test_loose_files_that_are_not_the_published_model_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    shutil.copy(folder / "model.safetensors", other)
    with pytest.raises(LunaInputError, match=r"'other.safetensors' is not the published SAM3: \d+ of \d+ weights"):
        load_sam3(other)
    repacked = tmp_path / "repacked.safetensors"
    save_file({"detector.backbone.vision_backbone.trunk.pos_embed": torch.zeros(1)}, repacked)
    with pytest.raises(LunaInputError, match="does not name its weights as transformers does"):
        load_sam3(repacked)
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    with pytest.raises(LunaInputError, match="damaged or not downloaded"):
        load_sam3(empty)
