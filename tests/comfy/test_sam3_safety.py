"""A SAM3 folder from anywhere can bring in nothing but numbers: no code, no pickle, no hub, no other package."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from luna_refinement.errors import LunaInputError
from luna_refinement.nodes.folders import SAM3_FOLDER
from luna_refinement.nodes.sam3 import LunaSAM3Loader
from luna_refinement.sam3_bridge.comfy_sam3 import detect, load_sam3
from luna_refinement.sam3_bridge.concepts import Concept

from harness.sam3 import tiny_model, write_tiny_sam3

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("models") / "sam3"
    write_tiny_sam3(path)
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def change(folder: Path, file: str, field: str, value: Any) -> None:
    """Sets a field, given by its way through the file's settings; makes the file where there is none."""
    path = folder / file
    settings: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    *way, last = field.split(".")
    inner = settings
    for key in way:
        inner = inner.setdefault(key, {})
    inner[last] = value
    path.write_text(json.dumps(settings))


VISION = "detector_config.vision_config"
CODE = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoProcessor": "evil.Evil", "AutoTokenizer": "evil.Evil"}
BRINGS_IN = [
    ("config.json", "auto_map", CODE),
    ("config.json", f"{VISION}.auto_map", CODE),
    ("config.json", f"{VISION}.backbone_config.auto_map", CODE),
    ("config.json", "trust_remote_code", True),
    ("config.json", "detector_config.attn_implementation", "kernels-community/flash-attn"),
    ("config.json", "detector_config._attn_implementation", "someone/kernel"),
    ("config.json", f"{VISION}.attn_implementation", "flash_attention_2"),
    ("config.json", "detector_config.experts_implementation", "someone/kernel"),
    ("config.json", f"{VISION}.backbone_config.model_type", "timm_wrapper"),
    ("config.json", "detector_config.text_config.model_type", "auto"),
    ("config.json", f"{VISION}.backbone", "resnet50"),
    ("config.json", f"{VISION}.use_timm_backbone", True),
    ("config.json", "detector_config.quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("config.json", "transformers_weights", "other.safetensors"),
    ("config.json", "architectures", ["EvilModel"]),
    ("config.json", "detector_config.anything", "https://example.invalid/x"),
    ("config.json", "detector_config.anything", "someone/model"),
    ("config.json", "detector_config.anything", ["..\\up"]),
    ("config.json", f"{VISION}.backbone_config.num_hidden_layers", 1_000_000),
    ("config.json", "detector_config.detr_encoder_config.num_layers", 1_000_000),
    ("config.json", f"{VISION}.backbone_config.image_size", 10_000_000),
    ("processor_config.json", "auto_map", CODE),
    ("processor_config.json", "processor_class", "EvilProcessor"),
    ("processor_config.json", "image_processor.auto_map", CODE),
    ("processor_config.json", "image_processor.image_processor_type", "TimmWrapperImageProcessor"),
    ("processor_config.json", "audio_tokenizer", {"audio_tokenizer_name_or_path": "someone/model"}),
    ("preprocessor_config.json", "auto_map", CODE),
    ("preprocessor_config.json", "image_processor_type", "EvilImageProcessor"),
    ("tokenizer_config.json", "auto_map", CODE),
    ("tokenizer_config.json", "tokenizer_class", "someone/tokenizer"),
    ("tokenizer_config.json", "tokenizer_class", "BertJapaneseTokenizer"),
    ("tokenizer_config.json", "tokenizer_file", "/etc/passwd"),
    ("tokenizer_config.json", "anything.deep", {"trust_remote_code": True}),
    ("generation_config.json", "custom_generate", "someone/generate"),
    ("special_tokens_map.json", "auto_map", CODE),
]


@pytest.mark.parametrize(("file", "field", "value"), BRINGS_IN, ids=[f"{row[0]}:{row[1]}" for row in BRINGS_IN])
def test_a_field_that_could_bring_in_more_is_refused_by_name(folder: Path, file: str, field: str, value: Any) -> None:
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Evil: pass\n")
    change(folder, file, field, value)
    with pytest.raises(LunaInputError, match=rf"sam3_model 'copy': {file} sets {field}"):
        load_sam3(folder)
    assert not ran.exists()


@pytest.mark.parametrize("file", ["adapter_config.json", "audio_tokenizer_config.json"])
def test_a_file_that_loads_a_further_model_is_refused_by_name(folder: Path, file: str) -> None:
    change(folder, file, "base_model_name_or_path", "someone/model")
    with pytest.raises(LunaInputError, match=f"'copy' holds {file}"):
        load_sam3(folder)


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "boom")


@pytest.mark.parametrize(
    "part",
    [
        "pytorch_model.bin",
        "sub/model.safetensors",
        "../copy/part.safetensors",
        "..\\part.safetensors",
        "{absolute}",
        "7",
    ],
)
def test_weights_are_read_from_safetensors_of_the_folder_alone(folder: Path, tmp_path: Path, part: str) -> None:
    weights = (folder / "model.safetensors").rename(folder / "part.safetensors")
    part = part.replace("{absolute}", str(weights))
    ran = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Bomb(ran)}))
    names = tiny_model(514).state_dict()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, part)}))
    with pytest.raises(LunaInputError, match=rf"'copy': {INDEX} names '.*' as a part of the weights"):
        load_sam3(folder)
    assert not ran.exists()


BROKEN = ("[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "gone.safetensors"}}', "{")
TOO_LONG = json.dumps({"weight_map": {"a": "9" * 5000 + ".safetensors"}})


@pytest.mark.parametrize("index", [*BROKEN, pytest.param(TOO_LONG, id="a name no file can have")])
def test_a_broken_list_of_parts_is_named(folder: Path, index: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(index)
    with pytest.raises(LunaInputError, match=f"sam3_model 'copy'.*{INDEX}"):
        load_sam3(folder)


def test_settings_nested_without_end_are_an_error(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(LunaInputError, match=r"'copy': tokenizer_config\.json cannot be read"):
        load_sam3(folder)


@pytest.mark.parametrize("name", ["..", ".", "", "sam3/", "../models/sam3", "{absolute}", "sam3/../sam3", "SAM3\0"])
def test_only_an_entry_of_the_model_folder_is_a_model(
    original: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A config.json lies beside the model folders too, so that every way out would find one."""
    shutil.copy(original / "config.json", original.parent.parent / "config.json")
    shutil.copy(original / "config.json", original.parent / "config.json")
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, SAM3_FOLDER, ([str(original.parent)], known[SAM3_FOLDER][1]))
    name = name.replace("{absolute}", str(original))
    assert "is not in models/sam3" in str(LunaSAM3Loader.validate_inputs(sam3_model=name))
    with pytest.raises(LunaInputError, match="is not in models/sam3"):
        LunaSAM3Loader.execute(sam3_model=name)


def test_what_published_folders_hold_besides_is_read_as_before(folder: Path, original: Path) -> None:
    """Origins, switches that are off, sharded weights, and settings for the video side of the model."""
    change(folder, "config.json", "_name_or_path", "facebook/sam3")
    change(folder, "config.json", "dtype", "float32")
    change(folder, "config.json", "detector_config._attn_implementation", "sdpa")
    change(folder, "config.json", "detector_config.quantization_config", None)
    change(folder, "config.json", f"{VISION}.use_timm_backbone", False)
    change(folder, "config.json", "tracker_config.model_type", "sam3_tracker_video")
    change(folder, "config.json", "detector_config.id2label", {"0": "a thing/another"})
    change(folder, "processor_config.json", "video_processor.video_processor_type", "Sam2VideoVideoProcessor")
    change(folder, "tokenizer_config.json", "name_or_path", "openai/clip-vit-large-patch14")
    change(folder, "tokenizer_config.json", "added_tokens_decoder", {"513": {"content": "<|endoftext|>"}})
    change(folder, "special_tokens_map.json", "pad_token", {"content": "<|endoftext|>", "lstrip": False})
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    tiny_model(config["detector_config"]["text_config"]["vocab_size"]).save_pretrained(folder, max_shard_size="200KB")
    (folder / "config.json").write_text(json.dumps(config))
    assert len(list(folder.glob("*.safetensors"))) > 2
    picture = torch.rand(1, 120, 200, 3, generator=torch.Generator().manual_seed(5))
    one, _ = detect(load_sam3(folder), picture, [Concept("face")], 0.05)
    other, _ = detect(load_sam3(original), picture, [Concept("face")], 0.05)
    assert [item.box for item in one] == [item.box for item in other]
    assert len(one) > 0
