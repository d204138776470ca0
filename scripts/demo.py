"""Brings small, noisy, compressed faces back, on a real ComfyUI server over its own interface.

demo.py            nine faces by the Semantic Detailer, all in one sampling call
demo.py --chess    a larger picture by the Chess Refiner, in two
demo.py --serve    leaves the web page open, with the workflow in its side bar

Before, after, the truth, all three side by side and close-ups of the faces go to demo_output, the Chess Refiner's to
demo_output/chess.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: ComfyUI has a module ``nodes`` of its own

from harness import workspace
from harness.demo import WORKFLOW_NAMES, place_workflows
from harness.demonstration import demonstrate
from harness.pictures import write_pictures
from harness.server import ComfyServer, ServerError
from training.scenes import CROWD, FACES

OUTPUT = workspace.ROOT / "demo_output"
README_PICTURES = {FACES: "demo.jpg", CROWD: "demo_chess.jpg"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Bring drawn faces back with the Semantic Detailer.")
    parser.add_argument("--chess", action="store_true", help="a larger picture with the Chess Refiner instead")
    parser.add_argument("--serve", action="store_true", help="leave the web page open afterwards")
    parser.add_argument("--port", type=int, default=None, help="port of the server (default: any free one)")
    parser.add_argument("--readme", action="store_true", help="also write the README's picture to docs")
    given = parser.parse_args(arguments)

    scene, folder = (CROWD, OUTPUT / "chess") if given.chess else (FACES, OUTPUT)
    write_pictures(workspace.BASE / "input")
    place_workflows(workspace.BASE)
    print("Starting ComfyUI …")
    try:
        with ComfyServer(workspace.comfyui_path(), workspace.BASE, given.port) as server:
            sheet = demonstrate(server, scene, folder)
            if given.readme:
                sheet.save(workspace.ROOT / "docs" / README_PICTURES[scene], quality=88)
            if given.serve:
                _serve(server, WORKFLOW_NAMES[scene])
    except ServerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def _serve(server: ComfyServer, workflow: str) -> None:
    print(f"\nThe web page is open at {server.url}: open “{workflow}” in its Workflows side bar. Ctrl+C ends it.")
    try:
        server.wait()
    except KeyboardInterrupt:
        print("\nStopped.")


if __name__ == "__main__":
    sys.exit(main())
