"""Trains the small models: run.py [--stage vae|pool|unet|weights]; stop it at any time, the next run goes on.

Order: VAE; training pairs with their latents; UNet with image encoder and adapter; then the weights in float16 to
training/weights.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import setup  # noqa: E402

STAGES = ("vae", "pool", "unet", "weights")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small models of demo and tests.")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this part; may be given more than once")
    stages = parser.parse_args().stage or STAGES
    setup.use_cores(os.cpu_count() or 1)
    setup.workspace.import_comfyui()
    setup.workspace.import_pack()
    folder = setup.workspace.CACHE / "training"
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
