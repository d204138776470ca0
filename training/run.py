"""Trains the small models: run.py [--stage vae|pool|unet|weights]; stop it at any time, the next run goes on.

Order: VAE; training pairs with their latents; UNet with image encoder and adapter; then the weights in float16 to
training/weights.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: ComfyUI has a module ``nodes`` of its own

from harness.comfyui import make_importable, use_cores
from harness.workspace import CACHE

STAGES = ("vae", "pool", "unet", "weights")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small models of demo and tests.")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this part; may be given more than once")
    stages = parser.parse_args().stage or STAGES
    use_cores(os.cpu_count() or 1)
    make_importable()
    folder = CACHE / "training"
    if "vae" in stages:
        from training import train_vae

        train_vae.train(folder)
    if "pool" in stages:
        from training import pool, train_unet

        pool.fill(train_unet.open_pool(folder))
    if "unet" in stages:
        from training import train_unet

        train_unet.train(folder)
    if "weights" in stages:
        from training import weights

        weights.write(folder)


if __name__ == "__main__":
    main()
