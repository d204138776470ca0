"""Pictures are checked at one door: what is none is refused, what lies outside 0..1 is said."""

import pytest
import torch
from luna_refinement.errors import LunaInputError
from luna_refinement.nodes.checks import check_image, range_notices


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_pictures_of_whole_or_other_numbers_are_refused(kind: torch.dtype) -> None:
    with pytest.raises(LunaInputError, match=f"image holds {kind}.*0 to 1"):
        check_image(torch.ones(1, 8, 8, 3).to(kind))


@pytest.mark.parametrize(
    "picture",
    [
        torch.randint(0, 256, (1, 64, 64, 3)).float(),
        torch.rand(1, 64, 64, 3) * 255,
        torch.randint(0, 20, (1, 64, 64, 3)).float(),
        torch.rand(1, 64, 64, 4) * 65535,
    ],
)
def test_float_pictures_of_0_to_255_are_refused(picture: torch.Tensor) -> None:
    with pytest.raises(LunaInputError, match=r"image holds values up to .*divide"):
        check_image(picture)


@pytest.mark.parametrize("picture", [torch.zeros(1, 4, 4, 3), torch.ones(1, 4, 4, 4), torch.rand(2, 9, 7, 3).half()])
def test_pictures_of_0_to_1_are_taken_in_silence(picture: torch.Tensor) -> None:
    check_image(picture)
    assert range_notices(picture) == []


def test_highlights_beyond_1_are_taken_and_said() -> None:
    picture = torch.rand(1, 64, 64, 3)
    picture[0, :8, :8] = 5.5
    picture[0, 9, 9] = -0.25
    check_image(picture)
    (line,) = range_notices(picture)
    assert "image holds values from -0.25 to 5.5" in line
    assert "clipped" in line


def test_what_resampling_overshoots_is_not_worth_a_word() -> None:
    assert range_notices(torch.tensor([-1e-3, 1 + 1e-3]).reshape(1, 1, 2, 1).expand(1, 1, 2, 3)) == []


@pytest.mark.parametrize("given", [None, [[0.5]], "picture", torch.rand(1, 4, 4, 3).to_sparse()])
def test_what_is_no_tensor_is_refused(given: torch.Tensor) -> None:
    with pytest.raises(LunaInputError, match="image is"):
        check_image(given)
