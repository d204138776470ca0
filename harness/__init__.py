"""What tests, scripts, benchmarks, training and noxfile share: the workspace, a real ComfyUI, small models, pages.

Each entry puts the repository's root on the path, last: ComfyUI has a module ``nodes`` of its own.
"""
