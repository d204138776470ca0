"""Nodes that skip steps for a whole batch: rows depend on each other, and the refiners say so."""

import importlib
import logging
from typing import Any

import pytest

from harness.refining import BOXES, Studio, detections, photograph

ROUNDING = 1e-4  # float32 in batches of another size, over six steps
easycache = importlib.import_module("comfy_extras.nodes_easycache")
CACHES = {"EasyCache": easycache.EasyCacheNode, "LazyCache": easycache.LazyCacheNode}


def cached(name: str, model: Any) -> Any:
    """A clone that skips nearly every step it may."""
    return CACHES[name].execute(model, 3.0, 0.0, 1.0, False).result[0]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "luna"]


@pytest.mark.parametrize("name", CACHES)
def test_both_refiners_say_that_rows_then_depend_on_each_other(
    sd15: Studio, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = photograph(height=192, width=192)
    model = cached(name, sd15.model)
    for run in (
        lambda: sd15.detail(image, detections(image, [(20.0, 20.0, 80.0, 80.0)]), model=model),
        lambda: sd15.chess(image, model=model),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "luna"):
            run()
        (line,) = [line for line in said(caplog) if "depend on each other" in line]
        assert name in line
        assert "whole batch" in line


def test_a_model_without_a_cache_gets_no_such_notice(sd15: Studio, caplog: pytest.LogCaptureFixture) -> None:
    image = photograph(height=192, width=192)
    with caplog.at_level(logging.WARNING, "luna"):
        sd15.detail(image, detections(image, [(20.0, 20.0, 80.0, 80.0)]))
    assert not [line for line in said(caplog) if "depend on each other" in line]


def test_the_notice_is_true(sd15: Studio) -> None:
    """A row alone and the same row beside others: equal without the cache, not with it."""
    image = photograph()
    model = cached("LazyCache", sd15.model)
    apart: dict[str, float] = {}
    for name, given in (("without", sd15.model), ("with", model)):
        alone, among = (
            sd15.detail(image, detections(image, boxes), model=given, steps=6)[3][0] for boxes in (BOXES[:1], BOXES)
        )
        apart[name] = float((alone - among).abs().max())
    assert apart["without"] < ROUNDING
    assert apart["with"] > 20 * ROUNDING
