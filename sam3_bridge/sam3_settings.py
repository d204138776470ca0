"""The settings in a SAM3 folder: what could bring in code, a hub or another package is refused by name.

transformers reads a folder's JSON files as instructions: which classes to make, from which module or repository, with
which kernels, from which weights. A SAM3 needs none of that freedom. Its numbers and switches may be anything in
reason; its texts must be names of transformers' own SAM and CLIP classes, plain words, or words of its tokenizer.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import LunaInputError
from ..values import shown

_WORD_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json")
"""Words and their numbers, which the tokenizer reads as such."""

_FOREIGN_FILES = ("adapter_config.json", "audio_tokenizer_config.json")
"""They make transformers load a further model."""

_FOREIGN = frozenset(
    {
        "auto_map", "custom_pipelines", "trust_remote_code", "code_revision", "quantization_config",
        "transformers_weights", "audio_tokenizer", "use_kernels", "kernel_config", "allow_all_kernels", "backbone",
        "use_timm_backbone", "use_pretrained_backbone", "gguf_file", "peft_config", "base_model_name_or_path",
    }
)  # fmt: skip
_ATTENTION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_OWN_ATTENTION = ("eager", "sdpa")
_MODEL_TYPE = re.compile(r"(sam[23]|clip)(_[a-z0-9]+)*")
_CLASS = re.compile(r"(Sam[23]|CLIP)[A-Za-z0-9]*")
_CLASS_KEY = re.compile(r"architectures|.*_class|.*processor_type|.*extractor_type")
_FREE_KEY = re.compile(r"_?name_or_path|transformers_version|(torch_)?dtype|content|.*_tokens?")
"""Texts that name nothing to be loaded: where the files came from, and words of the tokenizer."""

_NAMES = ("id2label", "label2id")
"""Names of outputs, which nothing reads."""

_PLAIN = re.compile(r"[A-Za-z0-9_ +-]*")
_LIMITS = {"layers": 256, "image_size": 4096}
"""By the end of the field's name: how much a SAM3 may claim before a weight is read."""


def read_settings(path: Path, file: str) -> dict[str, Any]:
    """The settings of one JSON file of a folder.

    Raises:
        LunaInputError: it cannot be read, or holds no settings.
    """
    try:
        settings = json.loads((path / file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LunaInputError(f"sam3_model '{path.name}': {file} cannot be read ({error})") from error
    if not isinstance(settings, dict):
        raise LunaInputError(f"sam3_model '{path.name}': {file} holds no settings")
    return settings


def check_settings(path: Path, index: str) -> None:
    """Checks every JSON file of a folder that transformers may read.

    Args:
        path: the folder.
        index: name of the file that lists the parts of the weights, where there is one.

    Raises:
        LunaInputError: naming file, field and what it holds.
    """
    for file in sorted(entry.name for entry in path.glob("*.json")):
        if file in _FOREIGN_FILES:
            raise LunaInputError(
                f"sam3_model '{path.name}' holds {file}, which would load another model: remove it, or download the "
                "published folder again"
            )
        if file == index:
            _check_parts(path, index)
        elif file not in _WORD_FILES:
            for field, value in _fields(read_settings(path, file)):
                if reason := _fault(field[-1], value):
                    raise LunaInputError(
                        f"sam3_model '{path.name}': {file} sets {'.'.join(field)} to {value!r}, {reason}. Luna loads "
                        "only transformers' own SAM3 from this folder: download the published one again"
                    )


def _check_parts(path: Path, index: str) -> None:
    parts = read_settings(path, index).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise LunaInputError(f"sam3_model '{path.name}': {index} lists no parts of the weights. Download it again")
    files = {entry.name for entry in path.iterdir() if entry.is_file()}
    for part in {str(part) for part in parts.values()}:
        if not part.endswith(".safetensors") or part != Path(part).name or "\\" in part:
            raise LunaInputError(
                f"sam3_model '{path.name}': {index} names {shown(part)} as a part of the weights: only .safetensors "
                "files of this very folder are read"
            )
        if part not in files:
            raise LunaInputError(
                f"sam3_model '{path.name}' lacks {shown(part)}, which {index} names. Download it again"
            )


def _fields(settings: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every field with its way through the settings; items of lists count as the list's."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((key,), value) for key, value in settings.items()]
    while waiting:
        field, value = waiting.pop()
        yield field, value
        if isinstance(value, dict) and field[-1] not in _NAMES:
            waiting += [((*field, key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(field, inner) for inner in value]


def _fault(key: str, value: Any) -> str | None:
    """What is wrong with a field, None where nothing is."""
    if key in _FOREIGN:
        return "which would bring in code, weights or packages from elsewhere" if value else None
    if isinstance(value, int | float):
        limit = next((limit for end, limit in _LIMITS.items() if key.endswith(end)), None)
        fits = limit is None or -limit <= value <= limit
        return None if fits else f"but no SAM3 has more than {limit}"
    if not isinstance(value, str) or _FREE_KEY.fullmatch(key):
        return None
    if _ATTENTION.fullmatch(key):
        return None if value in _OWN_ATTENTION else "which may load a kernel from a hub: leave it out"
    if key == "model_type":
        return None if _MODEL_TYPE.fullmatch(value) else "which is no part of SAM3"
    if _CLASS_KEY.fullmatch(key):
        return None if _CLASS.fullmatch(value) else "which is no class of transformers' SAM3"
    return None if _PLAIN.fullmatch(value) else "which may name a file, a module or a hub"
