"""The trained family: the files ComfyUI loads compute what the narrow networks learnt."""

from typing import Any

import comfy.clip_vision
import comfy.samplers
import comfy.sd
import pytest
import torch
from luna_refinement.ip_adapter.comfy_adapter import as_ip_adapter
from luna_refinement.ip_adapter.comfy_encode import encode_rows
from luna_refinement.ip_adapter.comfy_patch import patch_model
from torch import Tensor

from harness.demo import face_crops
from harness.seeding import StateDict
from training import family
from training.family import Narrow, narrow
from training.scenes import FACES


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Narrow:
    return narrow(tmp_path_factory.mktemp("narrow"))


@pytest.fixture(scope="module")
def wide() -> Narrow:
    """The same models as ComfyUI's loaders give them."""
    state = {name: tensor for name, tensor in family.checkpoint().items() if not name.startswith("cond_stage")}
    model, _, vae, _ = comfy.sd.load_state_dict_guess_config(state, output_clip=False)
    encoder = comfy.clip_vision.load_clipvision_from_sd(family.clip_vision())
    halves: dict[str, StateDict] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in family.ip_adapter().items():
        half, name = key.split(".", 1)
        halves[half][name] = tensor
    return Narrow(model, vae, encoder, as_ip_adapter(halves))


def _pictures(count: int) -> Tensor:
    return face_crops(FACES.degraded(), FACES.faces[:count])


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _agree(wide: Tensor, narrow: Tensor, tolerance: float) -> None:
    assert narrow.std() > 1e-3  # they say something
    assert wide.shape == narrow.shape
    assert (wide - narrow).abs().max() <= tolerance * narrow.abs().max()


def test_vae_is_the_narrow_vae(small: Narrow, wide: Narrow) -> None:
    images = _pictures(2)
    with torch.inference_mode():
        latents = small.vae.encode(images)
        _agree(wide.vae.encode(images), latents, 1e-4)
        _agree(wide.vae.decode(latents), small.vae.decode(latents), 1e-4)


def test_image_tokens_are_those_of_the_narrow_encoder(small: Narrow, wide: Narrow) -> None:
    """The wide encoder's weights lie in float16 on the CPU, and 20 layers pass on what the trained ones found."""
    images = _pictures(3)
    with torch.inference_mode():
        tokens = [encode_rows(models.adapter, models.clip_vision, images) for models in (wide, small)]
    _agree(tokens[0].cond, tokens[1].cond, 5e-3)
    _agree(tokens[0].uncond, tokens[1].uncond, 5e-3)
    assert (tokens[1].cond[0] - tokens[1].cond[1]).abs().max() > 0.1


def test_unet_denoises_as_the_narrow_one_with_anchors(small: Narrow, wide: Narrow) -> None:
    """A whole sampling call, so that text, anchors and every timestep take part."""
    with torch.inference_mode():
        embeds = encode_rows(small.adapter, small.clip_vision, _pictures(2))
        weights = torch.tensor([1.0, 0.5])
        results = [_sample(patch_model(m.model, m.adapter, embeds, weight=weights)) for m in (wide, small)]
    _agree(results[0], results[1], 1e-3)


def _sample(model: Any) -> Tensor:
    sampler = comfy.samplers.KSampler(model, 3, torch.device("cpu"), "euler", "normal", 0.6, model.model_options)
    text = [[_random(1, 77, 768), {}]]
    latents, noise = _random(2, 4, 24, 24), _random(2, 4, 24, 24).flip(0)
    return sampler.sample(noise, text, text, cfg=1.0, latent_image=latents, disable_pbar=True, seed=1)
