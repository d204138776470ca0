"""Refines five regions of a real photograph in one sampling call, on a real ComfyUI server over its own interface.

demo.py            writes before, after and side-by-side pictures to demo_output
demo.py --serve    does the same and leaves the server running for the web page
"""

import argparse
import shutil
import sys
from typing import Any

import workspace

sys.path.insert(0, str(workspace.ROOT / "tests"))

from builders.assets import ASTRONAUT
from builders.graphs import node_id, workflow
from builders.server import ComfyServer, ServerError
from PIL import Image

OUTPUT = workspace.ROOT / "demo_output"
GAP = 8  # px between the pictures of the side-by-side


class ProgressLine:
    """One line in the terminal that follows the running node."""

    def __init__(self, titles: dict[str, str]) -> None:
        self.titles = titles

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "executing" and data["node"] is not None:
            print(f"\n  {self.titles.get(str(data['node']), data['node'])}", end="", flush=True)
        elif kind == "progress":
            share = data["value"] / max(1, data["max"])
            bar = "█" * round(24 * share)
            title = self.titles.get(str(data["node"]), "")
            print(f"\r  {title}  {bar:░<24} {data['value']}/{data['max']}", end="", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Refine a real photograph with the Semantic Detailer.")
    parser.add_argument("--serve", action="store_true", help="leave the web page open afterwards")
    parser.add_argument("--port", type=int, default=None, help="port of the server (default: any free one)")
    arguments = parser.parse_args()

    graph = workflow("semantic_detailer", crop_size=448, steps=3, denoise=0.25, feather=12)
    titles = {key: node["_meta"]["title"] for key, node in graph.items()}
    print("Starting ComfyUI …")
    try:
        with ComfyServer(workspace.comfyui_path(), workspace.BASE, arguments.port) as server:
            print(f"Queueing workflows/api/semantic_detailer.json on {server.url}", end="")
            run = server.run(graph, ProgressLine(titles))
            (saved,) = run.outputs[node_id(graph, "SaveImage")]["images"]
            _write(server.image(saved))
            print(f"\n\nRefined in {run.seconds:.0f} s. The small models' weights are made up:")
            print("the pictures show the mechanics, not beauty.")
            for name in ("before", "after", "side_by_side"):
                print(f"  {OUTPUT / f'{name}.png'}")
            if arguments.serve:
                _serve(server)
    except ServerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def _write(after: Image.Image) -> None:
    OUTPUT.mkdir(exist_ok=True)
    shutil.copyfile(workspace.BASE / "input" / ASTRONAUT, OUTPUT / "before.png")
    before = Image.open(OUTPUT / "before.png").convert("RGB")
    both = Image.new("RGB", (before.width + GAP + after.width, before.height), "white")
    both.paste(before, (0, 0))
    both.paste(after, (before.width + GAP, 0))
    after.save(OUTPUT / "after.png")
    both.save(OUTPUT / "side_by_side.png")


def _serve(server: ComfyServer) -> None:
    print(f"\nThe web page is open at {server.url} (templates: Luna Refinement). Ctrl+C ends it.")
    try:
        server.wait()
    except KeyboardInterrupt:
        print("\nStopped.")


if __name__ == "__main__":
    sys.exit(main())
