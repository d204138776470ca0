"""Every node's schema as ComfyUI checks it when it registers the pack."""

import pytest
from comfy_api.latest import io
from luna_refinement.nodes import NODES


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_schema_is_valid_and_documented(node: type[io.ComfyNode]) -> None:
    schema = node.GET_SCHEMA()
    assert schema.node_id == node.__name__
    assert schema.category.startswith("Luna/")
    assert schema.description
    assert all(entry.tooltip for entry in (*schema.inputs, *schema.outputs))


def test_node_ids_are_unique() -> None:
    ids = [node.GET_SCHEMA().node_id for node in NODES]
    assert len(ids) == len(set(ids))
