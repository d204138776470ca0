"""Labels, patterns and names come with graphs from anywhere: the page shows them as text, and runs nothing of them."""

import json
from typing import Any

import pytest

from harness.assets import ASTRONAUT, SD15_CHECKPOINT
from harness.browser import BrowserError
from harness.graphs import Graph
from harness.page import ComfyPage

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

FOREIGN = (
    '<img src="x" onerror="window.ran=1">',
    "<svg/onload=window.ran=1>",
    "</span><script>window.ran=1</script>",
    "&lt;b&gt; &amp; &#60;i&#62;",
    "[[a link|https://example.invalid/]]",
    "https://example.invalid/x www.example.invalid",
    "<!-- a comment -->",
)
LABEL = " ".join(FOREIGN)

DETAILS = "[...document.querySelectorAll('button')].find(button => button.textContent.trim() === 'View details')"
"""Newer pages tell of an error in a corner, and show it in a panel."""

WATCH = """
    window.ran = 0
    window.added = []
    new MutationObserver(records => records.forEach(record => record.addedNodes.forEach(node => {
        for (const element of node.querySelectorAll ? [node, ...node.querySelectorAll('*')] : [])
            if (element.matches('img[src="x"], svg[onload], script:not([src]), a[href*="example.invalid"]'))
                window.added.push(element.outerHTML)
    }))).observe(document, { childList: true, subtree: true })
"""


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph_of(*nodes: dict[str, Any]) -> Graph:
    return {str(number): part for number, part in enumerate(nodes, start=1)}


def detections(label: str) -> dict[str, Any]:
    boxes = json.dumps({"boxes": [[10, 10, 90, 90]], "scores": [0.5], "labels": [label]})
    return node("LunaDetectionsFromBoxes", image=["1", 0], label="", boxes_json=boxes)


def filtered() -> dict[str, Any]:
    return node(
        "LunaDetectionsFilter", detections=["2", 0], labels="", min_score=0.9, min_size=0.0, max_size=1.0,
        keep="all", max_count=0, order="as found", nms_iou=1.0,
    )  # fmt: skip


def text_under(page: ComfyPage) -> str:
    """What a person reads under a node; word joiners have no look."""
    shown = page.browser.call(
        """async () => {
            const find = () => [...document.querySelectorAll('span')]
                .map(span => span.textContent).filter(text => text.startsWith('none of'))
            for (let tries = 0; tries < 100 && !find().length; tries++)
                await new Promise(done => setTimeout(done, 50))
            return find()[0] ?? ''
        }"""
    )
    return str(shown).replace("\u2060", "")


def assert_nothing_ran(page: ComfyPage) -> None:
    page.browser.evaluate("new Promise(done => setTimeout(done, 500))")
    assert page.browser.evaluate("window.added") == []
    assert page.browser.evaluate("window.ran") == 0


def shown_notice(page: ComfyPage) -> str:
    """Queues a graph whose filter leaves out a detection of a foreign label, and reads the notice about it."""
    page.reload()
    page.browser.evaluate(WATCH)
    preview = node("LunaDetectionsPreview", image=["1", 0], detections=["3", 0])
    graph = graph_of(node("LoadImage", image=ASTRONAUT), detections(LABEL), filtered(), preview)
    page.load_api(graph, "foreign")
    outputs = page.queue()
    assert outputs["3"]["text"] == [f"none of 1 detections passed; labels: {LABEL}"]
    return text_under(page)


def test_a_label_under_a_node_is_read_as_it_is_written(page: ComfyPage) -> None:
    shown = shown_notice(page)
    assert_nothing_ran(page)
    assert shown == f"none of 1 detections passed; labels: {LABEL}"


def test_the_oldest_supported_page_shows_it_alike(older_page: ComfyPage) -> None:
    shown = shown_notice(older_page)
    assert_nothing_ran(older_page)
    assert shown == f"none of 1 detections passed; labels: {LABEL}"


def test_labels_in_pictures_plans_and_queue_are_text(page: ComfyPage) -> None:
    page.reload()
    page.browser.evaluate(WATCH)
    plan = node(
        "LunaRefinePlan", image=["1", 0], model=["3", 0], vae=["3", 2], steps=4, crop_size=128, padding=0.1, feather=8,
        mask_mode="mask", overlap_mode="together", tile_size=128, min_overlap=0.125, tile_feather=1.0,
        tile_order="chess", chunk_size=0, detections=["2", 0],
    )  # fmt: skip
    graph = graph_of(
        node("LoadImage", image=ASTRONAUT),
        detections(LABEL),
        node("CheckpointLoaderSimple", ckpt_name=SD15_CHECKPOINT.split("/")[1]),
        plan,
        node("LunaDetectionsPreview", image=["1", 0], detections=["2", 0]),
        node("PreviewImage", images=["4", 0]),
        node("PreviewAny", source=["4", 1]),
    )
    page.load_api(graph, "foreign")
    outputs = page.queue()
    assert LABEL in outputs["4"]["text"][0]
    assert LABEL in outputs["7"]["text"][0]
    page.browser.evaluate("window.app.extensionManager.sidebarTab.toggleSidebarTab('queue')")
    assert_nothing_ran(page)


@pytest.mark.parametrize(
    ("bad", "quoted"),
    [
        (node("LunaLayerWeights", preset="linear", blocks=LABEL.replace(",", " ")), "is no block:weight pair"),
        (node("LunaSAM3Loader", sam3_model=LABEL), "is not in models/sam3"),
    ],
)
def test_foreign_words_in_an_error_are_text(page: ComfyPage, bad: dict[str, Any], quoted: str) -> None:
    page.reload()
    page.browser.evaluate(WATCH)
    page.load_api(graph_of(bad, node("PreviewAny", source=["1", 0])), "foreign")
    with pytest.raises(BrowserError, match=quoted):
        page.queue()
    page.browser.wait_for(f"document.querySelector('[role=dialog]') ?? {DETAILS}", 20)
    page.browser.evaluate(f"{DETAILS}?.click()")
    assert_nothing_ran(page)
