"""The pack in a real ComfyUI server, through its queue, as the web page and API clients use it."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness import assets
from harness.graphs import Graph, change, node_id, workflow
from harness.pictures import REGIONS, astronaut
from harness.server import ComfyServer, InterruptedByUser, Run, ServerError

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("server")]

PACK = "luna_refinement"


def saved(server: ComfyServer, run: Run, graph: Graph) -> np.ndarray:
    (reference,) = run.outputs[node_id(graph, "SaveImage")]["images"]
    return np.asarray(server.image(reference))


@pytest.mark.parametrize("which", ["server", "older_server"])
def test_the_pack_loads_without_a_warning(which: str, request: pytest.FixtureRequest) -> None:
    running: ComfyServer = request.getfixturevalue(which)
    assert running.pack_import_seconds(PACK) < 3  # raises where the import failed; how fast it is, is measured below
    assert running.log_about("luna") == []
    assert "Traceback" not in running.log()


def test_importing_the_pack_takes_no_time(server: ComfyServer) -> None:
    """Processor time beyond ComfyUI's own, which a busy machine does not change; the best of three processes."""
    code = """
import sys, time, importlib.util
root, comfyui = sys.argv.pop(), sys.argv.pop()
sys.path.insert(0, comfyui)
import utils.extra_config
from comfy.cli_args import args
args.cpu = True
import nodes, server, comfy_api.latest, comfy.samplers, latent_preview
start = time.process_time()
spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
spec.loader.exec_module(module)
print(time.process_time() - start)
"""
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", code, str(server.comfyui), root]
    seconds = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) for _ in range(3)
    ]
    assert min(seconds) < 0.3


@pytest.mark.parametrize("which", ["server", "older_server"])
def test_every_input_has_a_tooltip_and_every_node_a_page(which: str, request: pytest.FixtureRequest) -> None:
    running: ComfyServer = request.getfixturevalue(which)
    nodes = {name: info for name, info in running.get("/object_info").items() if name.startswith("Luna")}
    assert {"LunaSemanticDetailer", "LunaChessRefiner", "LunaIPAdapterLoader"} <= nodes.keys()
    for name, info in nodes.items():
        assert info["category"].startswith("Luna/")
        assert info["description"]
        inputs = info["input"].get("required", {}) | info["input"].get("optional", {})
        for key, spec in inputs.items():
            assert spec[1].get("tooltip"), f"{name}.{key} has no tooltip"
        page = running.get_bytes(f"/extensions/{PACK}/docs/{name}.md").decode()
        missing = [key for key in inputs if f"`{key}`" not in page]
        assert not missing, f"the page of {name} does not speak of {missing}"


def test_the_detailer_workflow_runs_from_queue_to_picture(server: ComfyServer) -> None:
    graph = workflow("semantic_detailer")
    run = server.run(graph)
    detailer = node_id(graph, "LunaSemanticDetailer")

    steps = run.progress(detailer)
    assert steps[-1] == (5 * 4, 5 * 4)  # five painted regions, four steps
    assert steps == sorted(steps)
    assert run.previews
    assert max(picture.width / picture.height for picture in run.previews) > 2  # rows side by side

    before, after = np.asarray(astronaut()), saved(server, run, graph)
    assert after.shape == before.shape
    changed = (before != after).any(-1)
    for x1, y1, x2, y2 in REGIONS.values():
        assert changed[(y1 + y2) // 2 - 5 : (y1 + y2) // 2 + 5, (x1 + x2) // 2 - 5 : (x1 + x2) // 2 + 5].any()
        changed[max(0, y1 - 40) : y2 + 40, max(0, x1 - 40) : x2 + 40] = False
    assert not changed.any()


def test_cancel_in_mid_sampling_and_then_a_clean_run(server: ComfyServer) -> None:
    graph = workflow("semantic_detailer", seed=5, crop_size=64)
    detailer = node_id(graph, "LunaSemanticDetailer")
    steps_seen = []

    def stop_early(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and str(data["node"]) == detailer:
            steps_seen.append(data["value"])
            if len(steps_seen) == 1:
                server.interrupt()

    with pytest.raises(InterruptedByUser):
        server.run(graph, stop_early)
    assert steps_seen
    assert max(steps_seen) < 5 * 4

    first = saved(server, server.run(graph), graph)
    server.post("/free", {"unload_models": True, "free_memory": True})
    second = saved(server, server.run(change(graph, "SaveImage", filename_prefix="again")), graph)
    assert np.array_equal(first, second)


def test_no_detections_let_the_picture_through_with_a_notice(server: ComfyServer) -> None:
    graph = change(workflow("semantic_detailer"), "LoadImage", image=assets.ASTRONAUT)
    run = server.run(graph)
    assert np.array_equal(saved(server, run, graph), np.asarray(astronaut()))
    (text,) = run.outputs[node_id(graph, "LunaSemanticDetailer")]["text"]
    assert "passes through unchanged" in text
    assert text in server.log()


def test_text_only_is_said_on_the_node(server: ComfyServer) -> None:
    graph = workflow("semantic_detailer", steps=1)
    graph = change(graph, "LunaSemanticDetailer", ip_adapter=None, clip_vision=None)
    run = server.run(graph)
    texts = run.outputs[node_id(graph, "LunaSemanticDetailer")]["text"]
    (text,) = (line for line in texts if "text only" in line)
    shown = [data for kind, data in run.events if kind == "progress_text"]
    assert shown or text in server.log()


def test_an_adapter_without_clip_vision_is_refused_before_sampling(server: ComfyServer) -> None:
    graph = change(workflow("semantic_detailer"), "LunaSemanticDetailer", clip_vision=None)
    with pytest.raises(ServerError, match="clip_vision is not"):
        server.run(graph)


def test_an_sdxl_adapter_on_sd15_is_refused_before_sampling(server: ComfyServer) -> None:
    file = assets.SDXL_PLUS.split("/", 1)[1]
    graph = change(workflow("semantic_detailer"), "LunaIPAdapterLoader", ip_adapter_file=file)
    with pytest.raises(ServerError, match="made for SDXL"):
        server.run(graph)


def test_a_truncated_adapter_file_is_refused_by_name(server: ComfyServer) -> None:
    whole = server.base / "models" / assets.SD15_PLAIN
    broken = whole.with_name("luna_test_truncated.safetensors")
    broken.write_bytes(whole.read_bytes()[:100_000])
    try:
        graph = change(workflow("semantic_detailer"), "LunaIPAdapterLoader", ip_adapter_file=broken.name)
        with pytest.raises(ServerError, match="incomplete or damaged"):
            server.run(graph)
    finally:
        broken.unlink()


def test_older_comfyui_runs_the_workflow_too(older_server: ComfyServer) -> None:
    graph = workflow("semantic_detailer", steps=2)
    run = older_server.run(graph)
    after = saved(older_server, run, graph)
    assert (after != np.asarray(astronaut())).any()
    assert run.progress(node_id(graph, "LunaSemanticDetailer"))[-1] == (10, 10)


def test_sides_that_are_no_multiple_of_8_keep_their_size(server: ComfyServer) -> None:
    picture = astronaut().crop((100, 40, 333, 233)).convert("RGBA")
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (80, 40, 140, 100))
    picture.putalpha(alpha)
    file = io.BytesIO()
    picture.save(file, "PNG")
    name = "luna_test_odd.png"
    (server.base / "input" / name).write_bytes(file.getvalue())
    try:
        graph = workflow("semantic_detailer", picture=name, steps=1)
        assert saved(server, server.run(graph), graph).shape == (193, 233, 3)
    finally:
        (server.base / "input" / name).unlink()


def test_the_fast_workflow_runs_with_its_lora_at_automatic_sizes(server: ComfyServer) -> None:
    fast: dict[str, Any] = {"steps": 2, "crop_size": 0, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "sgm_uniform"}
    graph = workflow("fast_faces", **fast)
    run = server.run(graph)
    assert run.progress(node_id(graph, "LunaSemanticDetailer"))[-1] == (5 * 2, 5 * 2)
    crops = [picture for key in ("11", "12") for picture in run.outputs[key]["images"]]
    assert [server.image(picture).size for picture in crops] == [(512, 512)] * 10
    assert server.log_about("lora key not loaded") == []  # what ComfyUI says of a part that fits no layer

    without = change(graph, "LoraLoaderModelOnly", strength_model=0.0)
    assert not np.array_equal(saved(server, run, graph), saved(server, server.run(without), without))


@pytest.fixture(scope="session")
def tiny_sam3(server: ComfyServer) -> str:
    """Name of a SAM3 folder with random weights in the server's models."""
    from harness.sam3 import write_tiny_sam3

    name = "luna_tiny_sam3"
    folder = server.base / "models" / "sam3" / name
    if not (folder / "model.safetensors").is_file():
        write_tiny_sam3(folder)
    return name


def test_from_words_to_picture(server: ComfyServer, tiny_sam3: str) -> None:
    graph = workflow("sam3_face_detailer", picture=assets.ASTRONAUT, steps=1, crop_size=64)
    graph = change(graph, "LunaSAM3Loader", sam3_model=tiny_sam3)
    graph = change(graph, "LunaSAM3Detect", concepts="face:2\nhelmet:2", threshold=0.0)
    graph = change(graph, "LunaDetectionsFilter", min_score=0.0, min_size=0.0, max_count=3)
    run = server.run(graph)
    detailer = node_id(graph, "LunaSemanticDetailer")
    rows = run.progress(detailer)[-1][1]
    assert 1 <= rows <= 3
    (reference,) = run.outputs[node_id(graph, "SaveImage")]["images"]
    assert (np.asarray(server.image(reference)) != np.asarray(astronaut())).any()


def test_the_chess_workflow_upscales_and_refines_in_two_passes(server: ComfyServer) -> None:
    graph = workflow("chess_refiner", picture=assets.ASTRONAUT, steps=1)
    run = server.run(graph)
    assert run.progress(node_id(graph, "LunaChessRefiner"))[-1] == (9, 9)  # 256 px in tiles of 128 px: 5 even, 4 odd
    (reference,) = run.outputs[node_id(graph, "SaveImage")]["images"]
    assert server.image(reference).size == (256, 256)


def test_the_full_pipeline_runs(server: ComfyServer) -> None:
    graph = workflow("full_pipeline", steps=1, crop_size=64)
    run = server.run(graph)
    assert run.progress(node_id(graph, "LunaSemanticDetailer"))[-1] == (5, 5)
    assert run.progress(node_id(graph, "LunaChessRefiner"))[-1] == (9, 9)
