"""Nodes that skip steps for a whole batch: rows depend on each other, and the refiners say so."""

import importlib
import logging
from typing import Any

import pytest

from harness.refining import BOXES, Studio, detections, photograph

ROUNDING = 1e-4  # float32 in batches of another size, over six steps
easycache = importlib.import_module("comfy_extras.nodes_easycache")
CACHES = {"EasyCache": easycache.EasyCacheNode, "LazyCache": easycache.LazyCacheNode}


def cached(name: str, model: Any, threshold: float = 0.2) -> Any:
    """A clone that skips steps in the whole schedule."""
    return CACHES[name].execute(model, threshold, 0.0, 1.0, False).result[0]


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


def apart(studio: Studio, model: Any) -> float:
    """How far a row beside others is from the same row alone."""
    image = photograph()
    alone, among = (
        studio.detail(image, detections(image, boxes), model=model, steps=6)[3][0] for boxes in (BOXES[:1], BOXES)
    )
    return float((alone - among).abs().max())


def test_the_notice_is_true(sd15: Studio) -> None:
    """At some threshold the other rows decide whether a step of this one is skipped."""
    assert apart(sd15, sd15.model) < ROUNDING
    thresholds = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    assert max(apart(sd15, cached("LazyCache", sd15.model, threshold)) for threshold in thresholds) > 20 * ROUNDING
