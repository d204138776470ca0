"""The model folders of this pack, known to ComfyUI; folders that other packs or the user declared are kept."""

import os

import folder_paths

IP_ADAPTER_FOLDER = "ipadapter"
SAM3_FOLDER = "sam3"


def register_folders() -> None:
    """Declares models/ipadapter and models/sam3 where nobody has."""
    for name in (IP_ADAPTER_FOLDER, SAM3_FOLDER):
        if name not in folder_paths.folder_names_and_paths:
            path = os.path.join(folder_paths.models_dir, name)
            folder_paths.folder_names_and_paths[name] = ([path], set(folder_paths.supported_pt_extensions))
