"""Rows: what each region gets of its own, resolved in one place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luna_refinement.batching.concepts import Concept, Lora
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.plan import RefinePlan
from luna_refinement.batching.rows import MaskedPicture, Row, resolve_rows
from luna_refinement.ip_adapter import LayerWeights
from luna_refinement.picture.detections import Detection

SHARED = {"positive": [[torch.zeros(1, 77, 8), {}]], "negative": [[torch.ones(1, 77, 8), {}]]}
OWN = [[torch.full((1, 77, 8), 2.0), {}]]


def plan(labels: str, pictures: int = 1) -> RefinePlan:
    """Regions side by side, spread over pictures in turn; one letter is one label."""
    found = [
        Detection(place % pictures, (40.0 * place, 10.0, 40.0 * place + 30, 40.0), label=label)
        for place, label in enumerate(labels)
    ]
    return plan_detections(found, 1024, 64, pictures, CropSettings(64), seed=3)


def test_a_row_without_a_concept_has_what_the_refiner_gives() -> None:
    (row,) = resolve_rows(plan("a"), SHARED, 0.4, anchor_weight=0.7)
    assert row.conditioning is not None
    assert row.conditioning == SHARED
    assert (row.denoise, row.loras, row.seed) == (0.4, (), row.region.seed)
    assert row.anchor is not None
    assert (row.anchor.weight, row.anchor.picture) == (0.7, None)


def test_a_concept_replaces_what_it_names_and_nothing_else() -> None:
    loras = (Lora("one", {}, 1.0), Lora("two", {}, -0.5))
    picture = torch.rand(1, 8, 8, 4)
    concepts = (
        Concept("a", negative=OWN, denoise=0.0),
        Concept("b", positive=OWN, ip_adapter_weight=0.0, loras=loras, image=picture),
    )
    a, b, c = resolve_rows(plan("abc"), SHARED, 0.4, concepts, anchor_weight=0.7)
    assert (a.conditioning["positive"], a.conditioning["negative"]) == (SHARED["positive"], OWN)
    assert (b.conditioning["positive"], b.conditioning["negative"]) == (OWN, SHARED["negative"])
    assert c.conditioning == SHARED
    assert [row.denoise for row in (a, b, c)] == [0.0, 0.4, 0.4]
    assert [row.loras for row in (a, b, c)] == [(), loras, ()]
    assert [row.anchor.weight for row in (a, b, c) if row.anchor] == [0.7, 0.0, 0.7]
    assert b.anchor is not None
    assert b.anchor.picture is not None
    assert torch.equal(b.anchor.picture, picture[0, ..., :3])


def test_the_first_concept_that_matches_counts_as_a_whole() -> None:
    concepts = (Concept("a", denoise=0.2), Concept("*", positive=OWN, denoise=0.9))
    first, other = resolve_rows(plan("ab"), SHARED, 0.4, concepts)
    assert (first.denoise, first.conditioning) == (0.2, SHARED)
    assert (other.denoise, other.conditioning["positive"]) == (0.9, OWN)


def test_rows_of_one_concept_share_their_conditioning() -> None:
    rows = resolve_rows(plan("abab"), SHARED, 0.4, (Concept("a", positive=OWN),))
    assert rows[0].conditioning is rows[2].conditioning
    assert rows[1].conditioning is rows[3].conditioning
    assert rows[0].conditioning is not rows[1].conditioning


def test_without_an_anchor_weight_rows_have_no_anchor_whatever_concepts_say() -> None:
    rows = resolve_rows(plan("a"), SHARED, 0.4, (Concept("a", ip_adapter_weight=1.0),))
    assert rows[0].anchor is None


@given(st.integers(1, 3), st.integers(1, 7), st.lists(st.floats(0, 2), min_size=2, max_size=4))
def test_the_row_curve_runs_over_the_rows_of_each_picture(pictures: int, each: int, curve: list[float]) -> None:
    weights = LayerWeights("linear", (), tuple(curve))
    rows = resolve_rows(plan("a" * pictures * each, pictures), SHARED, anchor_weight=0.5, layer_weights=weights)
    alone = [0.5 * factor for factor in weights.row_factors(each).tolist()]
    for picture in range(pictures):
        found = [row.anchor.weight for row in rows if row.anchor and row.region.image_index == picture]
        assert found == pytest.approx(alone)


def test_an_encoded_row_keeps_what_the_row_has() -> None:
    (row,) = resolve_rows(plan("a"), SHARED, 0.4, (Concept("a", loras=(Lora("one", {}, 1.0),)),), anchor_weight=0.7)
    masked = MaskedPicture(torch.rand(4, 8, 8), torch.ones(1, 64, 64))
    encoded = row.encoded(torch.rand(4, 8, 8), masked)
    assert isinstance(encoded, Row)
    assert all(getattr(encoded, name) is value for name, value in vars(row).items())
    assert encoded.masked is masked
