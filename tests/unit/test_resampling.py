"""Resampling one side at a time: the px PyTorch's own resampler gives, whichever part of them is asked for."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from luna_refinement.batching.resampling import resampled

sides = st.integers(1, 200)


@settings(max_examples=80, deadline=None)
@given(sides, sides, st.sampled_from([-2, -1]), st.data())
def test_any_part_is_that_of_pytorchs_antialiased_bicubic(limit: int, size: int, dim: int, data: st.DataObject) -> None:
    shape = (3, limit, 7) if dim == -2 else (3, 7, limit)
    planes = torch.rand(shape, generator=torch.Generator().manual_seed(limit * 211 + size))
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first + 1, size))
    whole = (size, 7) if dim == -2 else (7, size)
    wanted = F.interpolate(planes[None], size=whole, mode="bicubic", antialias=True)[0].narrow(dim, first, last - first)
    drawn = resampled(planes, dim, size, first, last)
    assert drawn.shape == wanted.shape
    assert float((drawn - wanted).abs().max()) < 2e-6  # some roundings of float32
