"""The translations say something for every text of every node, and for nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from comfy_api.latest import io
from luna_refinement.nodes import NODES

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = sorted(folder.name for folder in LOCALES.iterdir())

MESSAGE_SYNTAX = set("@{}|")
"""The page reads translations as vue-i18n messages, where these link, insert and pluralise."""


def read(language: str, name: str) -> dict[str, Any]:
    return dict(json.loads((LOCALES / language / name).read_text(encoding="utf-8")))


def texts_of(node: type[io.ComfyNode]) -> dict[str, str]:
    """Path of every text a person sees of a node, and its English."""
    schema = node.GET_SCHEMA()
    texts = {"display_name": schema.display_name or "", "description": schema.description}
    for entry in schema.inputs:
        texts[f"inputs.{entry.id}.name"] = entry.display_name or entry.id
        texts[f"inputs.{entry.id}.tooltip"] = entry.tooltip or ""
    for place, entry in enumerate(schema.outputs):
        texts[f"outputs.{place}.name"] = entry.display_name or entry.id or ""
        texts[f"outputs.{place}.tooltip"] = entry.tooltip or ""
    return {f"{schema.node_id}.{path}": text for path, text in texts.items()}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, value in tree.items():
        texts |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return texts


ENGLISH = {path: text for node in NODES for path, text in texts_of(node).items()}


@pytest.mark.parametrize("language", LANGUAGES)
class TestLanguage:
    def test_every_text_is_translated_and_no_other(self, language: str) -> None:
        found = flat(read(language, "nodeDefs.json"))
        assert sorted(ENGLISH.keys() - found.keys()) == []
        assert sorted(found.keys() - ENGLISH.keys()) == []

    def test_sentences_are_not_left_in_english(self, language: str) -> None:
        found = flat(read(language, "nodeDefs.json"))
        same = [path for path, text in ENGLISH.items() if found[path] == text]
        assert [path for path in same if path.endswith((".tooltip", ".description"))] == []

    def test_texts_hold_no_message_syntax(self, language: str) -> None:
        found = flat(read(language, "nodeDefs.json")) | flat(read(language, "main.json"))
        assert all(text.strip() for text in found.values())
        assert {path: text for path, text in found.items() if MESSAGE_SYNTAX & set(text)} == {}

    def test_names_keep_the_mark_of_the_pack(self, language: str) -> None:
        found = flat(read(language, "nodeDefs.json"))
        assert all(text.endswith("(Luna)") for path, text in found.items() if path.endswith(".display_name"))

    def test_categories_are_those_of_the_nodes(self, language: str) -> None:
        categories = {part for node in NODES for part in node.GET_SCHEMA().category.split("/")[1:]}
        assert read(language, "main.json")["nodeCategories"].keys() == categories
