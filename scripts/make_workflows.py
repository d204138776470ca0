"""Writes the bundled workflows in canvas form, and their pictures, from the API graphs in ``workflows/api``.

make_workflows.py                      every workflow, with a picture from a run on the trained models (minutes)
make_workflows.py --no-pictures NAME   only the canvas form of one workflow

The demo's workflows in ``demo`` are written too; that of the faces gives ``docs/graph.jpg``.

ComfyUI's own web page builds the canvas form, so that it is what a user would have saved. Needs Chromium.
"""

import argparse
import itertools
import json
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: ComfyUI has a module ``nodes`` of its own

from PIL import Image
from workflow_notes import DOWNLOADS, NOTES

from harness import workspace
from harness.assets import PAINTED_FACES
from harness.browser import BrowserError
from harness.graphs import TRAINED_FILES, WORKFLOWS, Graph, node_id, workflow
from harness.page import ComfyPage, fresh_base
from harness.server import ComfyServer, ServerError
from training.scenes import FACES
from training.scenes import FOLDER as DEMO

Box = tuple[float, float, float, float]

TITLE = 30  # graph units: a node's title bar, above its position
GAP = 30  # between the nodes of a group
MARGIN = 16  # between a group's border and its nodes
HEAD = 56  # a group's title
COLUMN_GAP = 60
GROUP_GAP = 40
NOTE_SIZE = (400, 520)
NOTE_HEIGHTS = {"fast_faces": 720}  # of longer notes
NOTE_TITLE = "Start here"


@dataclass(frozen=True)
class Place:
    """Where a kind of node stands.

    Attributes:
        column: counted from the left.
        group: title of the group around it.
        size: least width and height in graph units; the page's own least size may be more.
    """

    column: int
    group: str
    size: tuple[int, int]


PLACES = {
    "LoadImage": Place(1, "Picture", (360, 400)),
    "CheckpointLoaderSimple": Place(1, "Models", (360, 100)),
    "LoraLoaderModelOnly": Place(1, "Models", (360, 82)),
    "CLIPVisionLoader": Place(1, "Models", (360, 60)),
    "LunaIPAdapterLoader": Place(1, "Models", (360, 90)),
    "LunaSAM3Loader": Place(1, "Models", (360, 90)),
    "LunaPrepUpscale": Place(2, "Size", (360, 170)),
    "LunaDetectionsFromMasks": Place(2, "Regions", (360, 180)),
    "LunaDetectionsFromBoxes": Place(2, "Regions", (360, 300)),
    "LunaSAM3Detect": Place(2, "Regions", (360, 260)),
    "LunaDetectionsFilter": Place(2, "Regions", (360, 300)),
    "CLIPTextEncode": Place(2, "Prompts", (360, 110)),
    "LunaSemanticDetailer": Place(3, "Refine regions", (330, 1120)),
    "LunaChessRefiner": Place(4, "Refine the whole picture", (330, 1060)),
    "SaveImage": Place(5, "Result", (480, 560)),
    "LunaDetectionsPreview": Place(6, "What happened", (300, 300)),
    "PreviewImage": Place(6, "What happened", (300, 260)),
}
"""Where each kind of node stands; within a group in this order. The refiners have room for notices and live preview,
all of them for the taller rows of Nodes 2.0."""

COLORS = {
    "Picture": "#8A8",
    "Models": "#3f789e",
    "Size": "#8A8",
    "Regions": "#a1309b",
    "Prompts": "#b58b2a",
    "Refine regions": "#b06634",
    "Refine the whole picture": "#b06634",
    "Result": "#8A8",
    "What happened": "#88A",
}


class LayoutError(RuntimeError):
    """A node without a place, or two nodes on one another."""


@dataclass(frozen=True)
class Layout:
    """Boxes in graph units: x, y, width, height. A node's y is below its title bar, as the page counts it."""

    nodes: dict[str, Box]
    groups: dict[str, Box]
    note: Box


def lay_out(graph: Graph, least: Mapping[str, Sequence[float]], note_height: float = NOTE_SIZE[1]) -> Layout:
    """Columns from left to right by role, groups from top to bottom; ``least`` is the page's least size of each node.

    Raises LayoutError where a kind of node has no place.
    """
    unknown = {node["class_type"] for node in graph.values()} - PLACES.keys()
    if unknown:
        raise LayoutError(f"no place for {', '.join(sorted(unknown))}: add them to PLACES")
    nodes: dict[str, Box] = {}
    groups: dict[str, Box] = {}
    kinds = list(PLACES)
    ordered = sorted(graph, key=lambda key: (kinds.index(graph[key]["class_type"]), int(key)))
    x = float(NOTE_SIZE[0] + COLUMN_GAP)
    for _, column in itertools.groupby(ordered, lambda key: PLACES[graph[key]["class_type"]].column):
        keys = list(column)
        width = max(max(PLACES[graph[key]["class_type"]].size[0], least[key][0]) for key in keys)
        y = 0.0
        for title, members in itertools.groupby(keys, lambda key: PLACES[graph[key]["class_type"]].group):
            top = y
            y += HEAD
            for key in members:
                height = max(PLACES[graph[key]["class_type"]].size[1], least[key][1])
                nodes[key] = (x + MARGIN, y + TITLE, width, height)
                y += TITLE + height + GAP
            y += MARGIN - GAP
            groups[title] = (x, top, width + 2 * MARGIN, y - top)
            y += GROUP_GAP
        x += width + 2 * MARGIN + COLUMN_GAP
    return Layout(nodes, groups, (0.0, float(TITLE), float(NOTE_SIZE[0]), float(note_height)))


def canvas_form(page: ComfyPage, name: str, graph: Graph) -> dict[str, Any]:
    """The workflow as the web page serialises it, laid out, with its note and where its models are found."""
    page.reload()
    page.load_api(graph, name)
    least = page.browser.evaluate("Object.fromEntries(window.app.graph.nodes.map(n => [n.id, [...n.computeSize()]]))")
    layout = lay_out(graph, least, NOTE_HEIGHTS.get(name, NOTE_SIZE[1]))
    page.browser.call(
        """(layout, colors, noteTitle, noteText, downloads) => {
            const { graph } = window.app
            for (const [id, [x, y, width, height]] of Object.entries(layout.nodes)) {
                const node = graph.getNodeById(Number(id))
                node.pos = [x, y]
                node.setSize([width, height])
                const models = (node.widgets ?? []).map(widget => downloads[widget.value]).filter(Boolean)
                if (models.length) node.properties.models = models
            }
            for (const [title, [x, y, width, height]] of Object.entries(layout.groups)) {
                const group = new window.LiteGraph.LGraphGroup(title)
                group.pos = [x, y]
                group.size = [width, height]
                group.color = colors[title]
                graph.add(group)
            }
            const note = window.LiteGraph.createNode('MarkdownNote')
            note.title = noteTitle
            graph.add(note)
            note.pos = layout.note.slice(0, 2)
            note.setSize(layout.note.slice(2))
            note.widgets[0].value = noteText
        }""",
        {"nodes": layout.nodes, "groups": layout.groups, "note": layout.note},
        COLORS,
        NOTE_TITLE,
        NOTES[name],
        DOWNLOADS,
    )
    if page.overlapping():
        raise LayoutError(f"{name}: nodes lie on one another: {page.overlapping()}")
    if page.prompt() != graph:
        raise LayoutError(f"{name}: the web page reads the workflow otherwise than api/{name}.json")
    return _stable(page.serialised(), name)


def _stable(serialised: dict[str, Any], name: str) -> dict[str, Any]:
    """Without what depends on the window, with an id that depends on the name alone."""
    stable = dict(serialised)
    stable["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"luna-refinement/workflows/{name}"))
    stable["extra"] = {key: value for key, value in stable["extra"].items() if key != "ds"}
    return stable


SHOWN = ("semantic_detailer", "chess_refiner", "full_pipeline")
"""Workflows whose picture is a part of the demo's faces before and after a run on the trained models."""

PART = (404, 70, 576, 414)
"""x1, y1, x2, y2 px of the scene: three of its faces."""

TRAINED = {
    "cfg": 1.0,
    "steps": 5,
    "denoise": 0.45,
    "crop_size": 192,
    "target_size": 768,
    "tile_size": 192,
    "ip_adapter_weight": 1.0,
}
"""Settings that suit those models."""

CLOSE_UPS = {"sam3_face_detailer": "Regions", "fast_faces": "Models"}
"""Workflows whose models have no small stand-in: the picture shows this group of the graph instead of a run."""

GRAPH_PICTURE = (3000, 1500)  # px
THUMBNAIL = 400  # px, both sides
BETWEEN = 4  # px between before and after


def picture(server: ComfyServer, name: str) -> Image.Image:
    """Runs the workflow on the trained models: before on the left, after on the right."""
    graph = workflow(name, PAINTED_FACES, TRAINED_FILES, **TRAINED)
    run = server.run(graph)
    after = server.image(run.outputs[node_id(graph, "SaveImage")]["images"][0])
    sheet = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    width = (THUMBNAIL - BETWEEN) // 2
    for place, shown in enumerate((FACES.degraded(), after)):
        whole = shown.convert("RGB").resize(FACES.size, Image.Resampling.LANCZOS)
        part = whole.resize((width, THUMBNAIL), Image.Resampling.LANCZOS, PART)
        sheet.paste(part, (place * (width + BETWEEN), 0))
    return sheet


def graph_picture(server: ComfyServer) -> Image.Image:
    """The demo's graph on the web page after a run, large enough to read, at half its size."""
    width, height = GRAPH_PICTURE
    with ComfyPage(server, width + 100, height + 200) as page:
        page.load(json.loads((DEMO / f"{FACES.name}.json").read_text(encoding="utf-8")), FACES.name)
        page.queue()
        shown = page.close_up(*{place.group for place in PLACES.values()}, width=width, height=height)
    return shown.resize((width // 2, height // 2), Image.Resampling.LANCZOS)


def _write_canvas_forms(server: ComfyServer, names: Sequence[str], with_pictures: bool) -> None:
    with ComfyPage(server) as page:
        for name in names:
            folder = _folder(name)
            graph = json.loads((folder / "api" / f"{name}.json").read_text(encoding="utf-8"))
            text = json.dumps(canvas_form(page, name, graph), indent=2, ensure_ascii=False) + "\n"
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
            print(f"{folder.name}/{name}.json", flush=True)
            if with_pictures and name in CLOSE_UPS:
                _save(page.close_up(CLOSE_UPS[name]).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS), name)


def _folder(name: str) -> Path:
    """Where a workflow belongs: those of the demo name models that only the demo has, and are no templates."""
    return DEMO if (DEMO / "api" / f"{name}.json").is_file() else WORKFLOWS


def _save(picture: Image.Image, name: str) -> None:
    picture.save(WORKFLOWS / f"{name}.jpg", quality=85)
    print(f"workflows/{name}.jpg", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the bundled workflows in canvas form, and their pictures.")
    parser.add_argument("names", nargs="*", help="workflows to write (default: all)")
    parser.add_argument("--no-pictures", action="store_true", help="leave the pictures as they are")
    arguments = parser.parse_args()
    names = arguments.names or [path.stem for folder in (WORKFLOWS, DEMO) for path in sorted(folder.glob("api/*.json"))]
    try:
        with (
            tempfile.TemporaryDirectory(prefix="luna-base-") as folder,
            ComfyServer(workspace.comfyui_path(), fresh_base(Path(folder))) as server,
        ):
            _write_canvas_forms(server, names, not arguments.no_pictures)
            for name in () if arguments.no_pictures else names:
                if name in SHOWN:
                    _save(picture(server, name), name)
                if name == FACES.name:
                    graph_picture(server).save(workspace.ROOT / "docs" / "graph.jpg", quality=85)
    except (BrowserError, ServerError, LayoutError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
