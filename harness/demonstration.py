"""One run of the demo on a server: its graph queued, progress and likeness to the truth printed, pictures written."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from harness.demo import demo_graph
from harness.graphs import Graph, node_id
from harness.server import ComfyServer, Run
from training.scenes import CROWD, FACES, Box, Scene

GAP, LABEL = 8, 40  # px between the pictures of the side-by-side, and of the labels above them
COLUMNS, CELL, NAMES, AROUND = 9, 152, 90, 10  # close-ups: how many; px of each, of their names, around a face


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


@dataclass(frozen=True)
class Likeness:
    """How near a picture is to the truth: structural similarity, and PSNR in dB."""

    ssim: float
    psnr: float


def likeness(picture: Image.Image, truth: Image.Image, box: Box | None = None) -> Likeness:
    """Of the whole pictures, or of a box of both."""
    a, b = (np.asarray(whole.crop(box) if box else whole) for whole in (picture, truth))
    return Likeness(float(structural_similarity(a, b, channel_axis=-1)), float(peak_signal_noise_ratio(a, b)))


def likenesses(picture: Image.Image, scene: Scene) -> list[Likeness]:
    """Of each face of the scene."""
    truth = scene.truth()
    return [likeness(picture, truth, face.box) for face in scene.faces]


REFINERS = {FACES: "LunaSemanticDetailer", CROWD: "LunaChessRefiner"}


def calls(run: Run, graph: Graph, scene: Scene) -> list[int]:
    """Rows of every sampling call, as the server's progress messages tell: each step counts the rows it advanced."""
    key = node_id(graph, REFINERS[scene])
    values = [0, *(value for value, _ in run.progress(key))]
    advanced = [after - before for before, after in pairwise(values) if after > before]
    return advanced[:: graph[key]["inputs"]["steps"]]


def report(scene: Scene, before: Image.Image, after: Image.Image) -> str:
    """A table of every face's likeness before and after, and their means."""
    truth = scene.truth()
    lines = [f"  {'':14}{'SSIM':^18}{'PSNR in dB':^20}"]
    starts, ends = likenesses(before, scene), likenesses(after, scene)
    rows = list(zip([face.name for face in scene.faces], starts, ends, strict=True))
    for name, a, b in [*rows, ("whole picture", likeness(before, truth), likeness(after, truth))]:
        lines.append(f"  {name:14}{a.ssim:7.3f} → {b.ssim:.3f}  {a.psnr:8.1f} → {b.psnr:.1f}")
    better = sum(b.ssim > a.ssim for _, a, b in rows)
    mean = [float(np.mean([found.ssim for found in all_faces])) for all_faces in (starts, ends)]
    lines.append(f"\n  {better} of {len(rows)} faces are nearer to the truth; mean SSIM {mean[0]:.3f} → {mean[1]:.3f}")
    return "\n".join(lines)


def side_by_side(pictures: dict[str, Image.Image]) -> Image.Image:
    """The pictures in a row, their names above them."""
    width, height = next(iter(pictures.values())).size
    sheet = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height + LABEL), "white")
    font = ImageFont.load_default(0.7 * LABEL)
    for place, (name, picture) in enumerate(pictures.items()):
        x = place * (width + GAP)
        ImageDraw.Draw(sheet).text((x + width // 2, LABEL // 2), name, "black", font, anchor="mm")
        sheet.paste(picture, (x, LABEL))
    return sheet


def close_ups(pictures: dict[str, Image.Image], scene: Scene) -> Image.Image:
    """The first faces of the pictures, enlarged: a row for each picture, a column for each face."""
    faces = scene.faces[:COLUMNS]
    sheet = Image.new("RGB", (NAMES + len(faces) * CELL, len(pictures) * CELL), "white")
    font = ImageFont.load_default(0.6 * LABEL)
    for row, (name, picture) in enumerate(pictures.items()):
        ImageDraw.Draw(sheet).text((NAMES // 2, row * CELL + CELL // 2), name, "black", font, anchor="mm")
        for column, face in enumerate(faces):
            size = (CELL - GAP // 2, CELL - GAP // 2)
            cell = picture.resize(size, Image.Resampling.LANCZOS, face.around(AROUND))
            sheet.paste(cell, (NAMES + column * CELL, row * CELL))
    return sheet


def demonstrate(server: ComfyServer, scene: Scene, folder: Path) -> Image.Image:
    """Runs the scene's graph, prints what came of it, writes the pictures and returns the close-ups."""
    graph = demo_graph(scene)
    titles = {key: node["_meta"]["title"] for key, node in graph.items()}
    print(f"Queueing demo/api/{scene.name}.json on {server.url}", end="")
    run = server.run(graph, ProgressLine(titles))
    (saved,) = run.outputs[node_id(graph, "SaveImage")]["images"]
    before, after = scene.degraded(), server.image(saved)
    print(f"\n\n{report(scene, before, after)}")
    rows = calls(run, graph, scene)
    print(f"  {len(rows)} sampling call{'s' * (len(rows) > 1)} of {' and '.join(map(str, rows))} rows, ", end="")
    print(f"{run.seconds:.0f} s from queue to picture\n")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"before": before, "after": after, "truth": scene.truth()}
    sheets = {"side_by_side": side_by_side(pictures), "close_ups": close_ups(pictures, scene)}
    for name, picture in (pictures | sheets).items():
        picture.save(folder / f"{name}.png")
        print(f"  {folder / f'{name}.png'}")
    return sheets["close_ups"]
