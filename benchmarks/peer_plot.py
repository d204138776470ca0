"""The comparison with other packs as a picture: time over the number of regions, tiles, and px."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from peer_turns import Measured
from PIL import Image

Curve = Sequence[tuple[float, Measured]]
"""What the time grows with, and what was measured there."""

_COLOURS = ("tab:blue", "tab:orange", "tab:red")


def draw(panels: Mapping[tuple[str, str], Mapping[str, Curve]], path: Path) -> None:
    """One panel for each (title, name of the axis) with a curve for each side: median and the range of all turns."""
    from matplotlib.figure import Figure

    columns = 3
    figure = Figure(figsize=(11, 3.2 * -(-len(panels) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat
    for ((title, axis), curves), place in zip(panels.items(), axes, strict=False):  # panels first: no axis is lost
        for (name, curve), colour in zip(curves.items(), _COLOURS, strict=False):
            at = [x for x, _ in curve]
            place.plot(at, [side.median for _, side in curve], color=colour, marker="o", markersize=3, label=name)
            low, high = ([pick(side.seconds) for _, side in curve] for pick in (min, max))
            place.fill_between(at, low, high, color=colour, alpha=0.2)
        place.set(title=title, xlabel=axis, ylabel="seconds", ylim=(0, None), xticks=[x for x, _ in curve])
        place.legend(fontsize=8)
    for place in list(axes):
        place.set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    # a third of the bytes; without k-means, thin lines would get the colour of broad ones
    Image.open(drawn).convert("RGB").quantize(64, kmeans=8).save(path, optimize=True)
