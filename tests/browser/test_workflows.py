"""The bundled workflows in ComfyUI's own web page: they load, mean what their API form says, look tidy and run."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from harness.browser import BrowserError
from harness.graphs import WORKFLOWS, Graph, node_id, workflow
from harness.page import ComfyPage
from harness.server import ComfyServer

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

PACK = "luna_refinement"
LOCALES = WORKFLOWS.parent / "locales"
LANGUAGES = sorted(folder.name for folder in LOCALES.iterdir())
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
PICTURE_BYTES = 60_000
NODES_2 = "Comfy.VueNodes.Enabled"
EARLY_NODES_2 = "Comfy.VueNodes.AutoScaleLayout"


def canvas(name: str) -> dict[str, Any]:
    return dict(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")))


def api(name: str) -> Graph:
    return dict(json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8")))


def fetched(page: ComfyPage, path: str) -> tuple[int, str]:
    """Status and content type of what the page gets from the server."""
    answer = page.browser.call(
        "async path => { const a = await fetch(path); return [a.status, a.headers.get('content-type')] }", path
    )
    return answer[0], answer[1]


def help_fault(page: ComfyPage, node_type: str) -> str | None:
    """What is wrong with the help that the page shows for a kind of node."""
    try:
        shown = page.help_page(node_type)
    except BrowserError as error:
        return str(error)
    return None if "<h1" in shown and "<table" in shown else "no heading or no table of inputs"


def assert_all_but_the_note_in_groups(page: ComfyPage) -> None:
    assert [title.split(" ", 1)[1] for title in page.ungrouped()] == ["Start here"]


def is_widget(spec: list[Any]) -> bool:
    return isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def test_the_names() -> None:
    assert {"semantic_detailer", "fast_faces", "chess_refiner", "full_pipeline"} <= set(NAMES)
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == NAMES
    assert sorted(path.stem for path in WORKFLOWS.glob("*.jpg")) == NAMES


def test_loading_the_pack_wrote_no_warning(server: ComfyServer, page: ComfyPage) -> None:
    assert server.pack_import_seconds(PACK) >= 0  # raises where the import failed
    assert server.log_about("luna") == []
    assert "Traceback" not in server.log()
    assert not [error for error in page.start_errors if "luna" in error.lower()]


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_loads_and_means_what_its_api_form_says(name: str, page: ComfyPage, tmp_path: Path) -> None:
    page.reload()
    page.load(canvas(name), name)
    page.browser.screenshot().save(tmp_path / f"{name}.png")
    assert page.missing_types() == []
    assert page.errors == []
    assert page.prompt() == api(name)
    assert page.overlapping() == []
    assert_all_but_the_note_in_groups(page)


def test_the_oldest_supported_page_reads_them_alike(older_page: ComfyPage) -> None:
    for name in NAMES:
        older_page.load(canvas(name), name)
        assert older_page.missing_types() == []
        assert older_page.errors == []
        assert older_page.prompt() == api(name)
        assert older_page.overlapping() == []


@pytest.mark.parametrize("name", NAMES)
def test_the_api_form_names_every_widget(name: str, server: ComfyServer) -> None:
    offered = server.get("/object_info")
    for node in api(name).values():
        inputs = offered[node["class_type"]]["input"]
        widgets = {
            key for kind in ("required", "optional") for key, spec in inputs.get(kind, {}).items() if is_widget(spec)
        }
        assert widgets <= node["inputs"].keys()
        assert node["inputs"].keys() <= inputs.get("required", {}).keys() | inputs.get("optional", {}).keys()
        assert node["_meta"]["title"]


def test_the_templates_list_offers_the_workflows_with_their_pictures(server: ComfyServer, page: ComfyPage) -> None:
    assert sorted(server.get("/api/workflow_templates")[PACK]) == NAMES
    for name in NAMES:
        address = f"/api/workflow_templates/{PACK}/{name}"
        assert server.get(f"{address}.json") == canvas(name)
        assert fetched(page, f"{address}.jpg") == (200, "image/jpeg")
        picture = server.get_bytes(f"{address}.jpg")
        assert len(picture) < PICTURE_BYTES
        assert Image.open(io.BytesIO(picture)).size == (400, 400)


def test_the_templates_dialog_shows_and_opens_them(page: ComfyPage, tmp_path: Path) -> None:
    page.reload()
    offered = page.browse_templates(PACK)
    page.browser.screenshot().save(tmp_path / "templates.png")
    assert sorted(offered) == NAMES
    page.open_template("chess_refiner")
    assert page.prompt() == api("chess_refiner")


def test_the_page_shows_the_help_of_every_node(server: ComfyServer, page: ComfyPage) -> None:
    nodes = [name for name, info in server.get("/object_info").items() if info["python_module"].endswith(f".{PACK}")]
    assert len(nodes) > 10
    assert {name: fault for name in nodes if (fault := help_fault(page, name))} == {}


def test_the_page_speaks_the_languages_of_the_pack(older_page: ComfyPage, tmp_path: Path) -> None:
    """Front end 1.32, of the newer ComfyUI, drops every pack's translations when it loads its own; 1.25 shows them."""
    page = older_page
    try:
        for language in LANGUAGES:
            page.speak(language)
            known = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
            title, labels = page.texts("LunaSemanticDetailer")
            wanted = known["LunaSemanticDetailer"]
            assert title == wanted["display_name"]
            assert labels["detections"] == wanted["inputs"]["detections"]["name"]
            assert labels["crop_size"] == wanted["inputs"]["crop_size"]["name"]
            page.load(canvas("semantic_detailer"), "semantic_detailer")
            page.browser.screenshot().save(tmp_path / f"{language}.png")
            assert page.prompt().keys() == api("semantic_detailer").keys()
            assert page.errors == []
    finally:
        page.speak("en")


def test_the_page_runs_the_detailer_and_shows_its_picture(page: ComfyPage, tmp_path: Path) -> None:
    small = workflow("semantic_detailer", steps=2)
    page.reload()
    page.load(canvas("semantic_detailer"), "semantic_detailer")
    page.set_widgets(small)
    assert page.prompt() == small
    outputs = page.queue()
    save = node_id(small, "SaveImage")
    assert len(outputs[save]["images"]) == 1
    assert page.shown_pictures(save) == [(512, 512)]
    page.browser.screenshot().save(tmp_path / "after_the_run.png")
    assert page.overlapping() == []
    assert_all_but_the_note_in_groups(page)  # pictures and live preview included
    assert page.errors == []


@pytest.fixture
def nodes_2(page: ComfyPage) -> Iterator[ComfyPage]:
    """The page with its newer design, in which nodes are elements of the page."""
    if not page.has_setting(NODES_2) or page.has_setting(EARLY_NODES_2):
        pytest.skip("this page has no Nodes 2.0, or an early one, which moves nodes off their places")
    page.set_setting(NODES_2, True)
    yield page
    page.set_setting(NODES_2, False)


def test_nodes_2_show_every_workflow_and_what_a_run_says(nodes_2: ComfyPage, tmp_path: Path) -> None:
    page = nodes_2
    for name in NAMES:
        page.load(canvas(name), name)
        page.browser.wait_for("document.querySelectorAll('.lg-node').length === window.app.graph.nodes.length", 20)
        assert page.prompt() == api(name)
        assert page.overlapping() == []
        shown = page.node_elements()
        for node, (kind, inputs) in ((node, (part["class_type"], part["inputs"])) for node, part in api(name).items()):
            if kind.startswith("Luna"):
                assert [key for key in inputs if key not in shown[node][0]] == []
        page.browser.screenshot().save(tmp_path / f"{name}.png")
    small = workflow("semantic_detailer", steps=2)
    page.load(canvas("semantic_detailer"), "semantic_detailer")
    page.set_widgets(small)
    assert page.prompt() == small
    (notice,) = page.queue()[node_id(small, "LunaSemanticDetailer")]["text"]
    texts = f"[...document.querySelectorAll('.lg-node')].some(node => node.innerText.includes({json.dumps(notice)}))"
    page.browser.wait_for(texts, 20)
    page.browser.wait_for(f"document.querySelector('[data-node-id=\"{node_id(small, 'SaveImage')}\"] img')", 20)
    page.browser.screenshot().save(tmp_path / "after_the_run.png")
    assert page.node_elements()[node_id(small, "SaveImage")][1] == [(512, 512)]
    assert page.errors == []
