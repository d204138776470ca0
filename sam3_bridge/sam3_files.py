"""Where SAM3 lies on disk: which folders and files can be chosen, and what is wrong with the others."""

from collections.abc import Iterable
from pathlib import Path

from ..errors import LunaInputError
from .sam3_settings import check_settings, read_settings

NEEDED_TRANSFORMERS = "5.0"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_MODEL_TYPES = ("sam3", "sam3_video")

HOW_TO_GET = (
    "SAM3's weights are a gated download: 1. make a Hugging Face account, open the page of the model facebook/sam3 and "
    "accept its licence; 2. create a read token and run `hf auth login`; 3. run "
    "`hf download facebook/sam3 --local-dir models/sam3/sam3` in the ComfyUI folder; 4. press R. The folder "
    f"models/sam3/sam3 then holds {CONFIG}, {WEIGHTS}, processor_config.json and tokenizer.json. "
    "ComfyUI 0.20 and newer need none of it: connect MODEL and CLIP of a SAM3 checkpoint to SAM3 Detect (Luna)"
)


def list_models(folders: Iterable[str]) -> list[str]:
    """Folders with a ``config.json`` and loose ``.safetensors`` files below models/sam3, by name."""
    names = set()
    for folder in map(Path, folders):
        if folder.is_dir():
            names |= {entry.name for entry in folder.iterdir() if _is_model(entry)}
    return sorted(names)


def find_model(name: str, folders: Iterable[str]) -> Path:
    """The folder or file of a name that ``list_models`` gave.

    Raises:
        LunaInputError: no model folder has an entry of this name.
    """
    for folder in map(Path, folders):
        # by looking for it, not by joining names: "..", separators and absolute names are no entry of any folder
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.name == name and entry.exists():
                return entry
    raise LunaInputError(f"sam3_model '{name}' is not in models/sam3. {HOW_TO_GET}")


def check_folder(path: Path) -> None:
    """Raises LunaInputError unless a folder holds a SAM3 in the layout of transformers, whole as far as names tell.

    Its settings must be those of a SAM3 and nothing else, see ``sam3_settings``.
    """
    if not path.is_dir():
        raise LunaInputError(f"sam3_model '{path.name}' is no folder. {HOW_TO_GET}")
    if not (path / CONFIG).is_file():
        raise LunaInputError(f"sam3_model '{path.name}' lacks {CONFIG}. {HOW_TO_GET}")
    kind = read_settings(path, CONFIG).get("model_type")
    if kind not in _MODEL_TYPES:
        raise LunaInputError(f"sam3_model '{path.name}' holds a model of the type '{kind}', not SAM3. {HOW_TO_GET}")
    missing = []
    if not any((path / name).is_file() for name in (WEIGHTS, INDEX)):
        missing.append(WEIGHTS)
    if not any((path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        missing.append("processor_config.json")
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        missing.append("tokenizer.json")
    if missing:
        raise LunaInputError(f"sam3_model '{path.name}' lacks {', '.join(missing)}. {HOW_TO_GET}")
    check_settings(path, INDEX)


def _is_model(entry: Path) -> bool:
    return (entry / CONFIG).is_file() or (entry.is_file() and entry.suffix == ".safetensors")
