"""What is not sampled keeps its bits; what cannot be sampled is said before anything is."""

from dataclasses import replace
from typing import Any

import comfy.samplers
import pytest
import torch
from luna_refinement.batching.comfy_recipe import SamplingSettings, ksampler_recipe, least_share, with_denoise
from luna_refinement.batching.comfy_sampling import differential_mask
from luna_refinement.batching.concepts import Concept
from luna_refinement.errors import LunaInputError
from luna_refinement.nodes.upscale import LunaPrepUpscale
from luna_refinement.picture.detections import Detection, Detections

from harness import tiny
from harness.refining import Studio, counting, photograph

LEFT, RIGHT = (20.0, 180.0, 120.0, 280.0), (380.0, 60.0, 460.0, 140.0)
BOUND = 1e-4


def face_and_hand() -> Detections:
    return Detections((Detection(0, LEFT, label="face"), Detection(0, RIGHT, label="hand")), 512, 512)


def changed_in(before: torch.Tensor, after: torch.Tensor, box: tuple[float, ...]) -> float:
    x1, y1, x2, y2 = (int(side) for side in box)
    return float((before - after)[:, y1:y2, x1:x2].abs().max())


@pytest.mark.parametrize("overlap_mode", ["together", "waves"])
def test_a_concept_of_denoise_zero_keeps_its_regions_bits(sd15: Studio, overlap_mode: str) -> None:
    image = photograph()
    model, calls = counting(sd15.model)
    concepts = (Concept("hand", denoise=0.0),)
    refined, mask, before, after = sd15.detail(
        image, face_and_hand(), concepts=concepts, model=model, overlap_mode=overlap_mode
    )
    assert calls == [2] * 3  # the face alone, with two prompts
    assert changed_in(image, refined, RIGHT) == 0
    assert changed_in(image, refined, LEFT) > 0.01
    assert float(mask[:, 60:140, 380:460].max()) == 0
    assert torch.equal(before[1], after[1])
    plain = sd15.detail(image, face_and_hand())
    assert torch.equal(before[1], plain[2][1])
    assert float((after[0] - plain[3][0]).abs().max()) <= BOUND


def test_denoise_zero_refines_the_concepts_that_have_a_denoise(sd15: Studio) -> None:
    image = photograph()
    concepts = (Concept("hand", denoise=0.5),)
    refined, _, _, after = sd15.detail(image, face_and_hand(), concepts=concepts, denoise=0.0)
    assert changed_in(image, refined, LEFT) == 0
    assert changed_in(image, refined, RIGHT) > 0.01
    assert float((after[1] - sd15.detail(image, face_and_hand(), denoise=0.5)[3][1]).abs().max()) <= BOUND


def test_denoise_zero_everywhere_returns_the_picture_and_says_so(
    sd15: Studio, caplog: pytest.LogCaptureFixture
) -> None:
    image = photograph()
    refined = sd15.detail(image, face_and_hand(), concepts=(Concept("*", denoise=0.0),))[0]
    assert torch.equal(refined, image)
    assert "denoise is 0" in caplog.text


def test_rows_left_alone_are_named_on_the_node(sd15: Studio, caplog: pytest.LogCaptureFixture) -> None:
    sd15.detail(photograph(), face_and_hand(), concepts=(Concept("hand", denoise=0.0),))
    assert "denoise is 0 for 1 of 2 regions" in caplog.text


@pytest.mark.parametrize(
    ("steps", "strength", "scheduler"), [(8, 0.0, "normal"), (8, 0.05, "simple"), (2, 0.3, "simple")]
)
def test_refined_places_that_are_not_sampled_keep_their_bits(
    sd15: Studio, steps: int, strength: float, scheduler: str
) -> None:
    """Where the last step leaves some noise to take away at once, a share below that step's is not sampled either."""
    image = photograph(height=128, width=128)
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    settings = {"refined_strength": strength, "steps": steps, "denoise": 0.6, "scheduler": scheduler}
    refined = sd15.chess(image, refined_mask=mask, **settings)[0]
    assert torch.equal(refined[:, :, :64], image[:, :, :64])
    assert float((refined - image)[:, :, 88:].abs().max()) > 0.05


def test_a_soft_refined_mask_keeps_bits_only_where_nothing_is_sampled(sd15: Studio) -> None:
    image = photograph(height=128, width=128)
    mask = (1.5 - torch.arange(128.0) / 64).clamp(0, 1).expand(1, 128, 128).clone()  # 1 up to 32, 0 from 96 on
    refined = sd15.chess(image, refined_mask=mask, refined_strength=0.0, steps=8, denoise=0.6)[0]
    change = (refined - image).abs().mean(dim=(0, 1, 3))
    assert float(change[:33].max()) == 0
    assert float(change[72:].min()) > 0


def test_a_mask_over_the_whole_picture_with_strength_zero_costs_nothing(sd15: Studio) -> None:
    images = photograph(2, height=128, width=128)
    model, calls = counting(sd15.model)
    masks = torch.zeros(2, 128, 128)
    masks[0] = 1
    refined = sd15.chess(images, refined_mask=masks, refined_strength=0.0, model=model)[0]
    assert calls == [2] * 3  # the second picture alone
    assert torch.equal(refined[0], images[0])
    assert (refined[1] != images[1]).any()
    model, calls = counting(sd15.model)
    assert torch.equal(sd15.chess(images, refined_mask=torch.ones(1, 128, 128), refined_strength=0.0)[0], images)
    assert not calls


def test_a_refined_mask_at_another_size_keeps_bits_too(sd15: Studio) -> None:
    """Scaling it rounds 1 to 0.9999999."""
    image = photograph(height=128, width=128)
    mask = torch.zeros(1, 37, 37)
    mask[:, :, :20] = 1
    refined = sd15.chess(image, refined_mask=mask, refined_strength=0.0, denoise=0.6)[0]
    assert torch.equal(refined[:, :, :60], image[:, :, :60])
    assert (refined[:, :, 96:] != image[:, :, 96:]).any()


@pytest.mark.parametrize("strength", [0.05, 0.6, 1.0])
def test_refined_places_that_are_sampled_are_pasted_whole(sd15: Studio, strength: float) -> None:
    image = photograph(height=128, width=128)
    everywhere = {"refined_mask": torch.ones(1, 128, 128), "steps": 8, "denoise": 0.6}
    some = sd15.chess(image, refined_strength=strength, **everywhere)[0]
    assert (some != image).any(-1).float().mean() > 0.99


def test_the_least_share_is_what_the_last_step_of_the_differential_mask_lets_in(sd15: Studio) -> None:
    given = SamplingSettings(0, 6, 4.0, "euler", "simple", 0.7)
    recipe = ksampler_recipe(sd15.model, tiny.conditioning(), tiny.conditioning(), given)
    least = least_share(recipe)
    assert 0 < least < 0.2

    class Wrapped:
        inner_model = sd15.model.model

    options = {"model": Wrapped(), "sigmas": recipe.sigmas}
    levels = torch.tensor([0.0, least * 0.99, least * 1.01, 1.0]).reshape(4, 1, 1, 1)
    taken = [differential_mask(sigma.reshape(1), levels, options).flatten() for sigma in recipe.sigmas[:-1]]
    assert torch.stack(taken).amax(0).tolist() == [0, 0, 1, 1]


class Halving(comfy.samplers.Sampler):
    """A custom sampler whose result is told at a glance: half of what it was given."""

    def sample(
        self, model_wrap: Any, sigmas: Any, extra_args: Any, callback: Any, noise: Any, *rest: Any, **more: Any
    ) -> Any:
        latent = rest[0] if rest else more["latent_image"]
        return latent / 2


def test_a_custom_sampler_samples_rows_with_a_denoise_of_their_own(sd15: Studio) -> None:
    image = photograph()
    concepts = (Concept("hand", denoise=0.7),)
    custom = sd15.detail(image, face_and_hand(), concepts=concepts, sampler=Halving(), mask_latent=False)[3]
    with torch.inference_mode():
        crops = sd15.detail(image, face_and_hand(), denoise=0.0)[2]
        process = sd15.model.model
        latents = process.process_latent_in(sd15.vae.encode(crops)) / 2
        wanted = sd15.vae.decode(process.process_latent_out(latents))
    assert float((custom - wanted).abs().max()) <= BOUND


def test_another_share_of_the_schedule_keeps_sampler_and_guider(sd15: Studio) -> None:
    given = SamplingSettings(3, 6, 4.0, "euler", "karras", 0.7)
    recipe = replace(ksampler_recipe(sd15.model, [], [], given), sampler=Halving())
    other = with_denoise(recipe, 0.3)
    assert other.sampler is recipe.sampler
    assert other.guider is recipe.guider
    assert other.seed == 3
    assert torch.equal(other.sigmas, ksampler_recipe(sd15.model, [], [], replace(given, denoise=0.3)).sigmas)


def test_a_denoise_that_own_sigmas_rule_out_is_named_before_anything_is_sampled(sd15: Studio) -> None:
    image = photograph()
    model, calls = counting(sd15.model)
    sigmas = torch.tensor([3.0, 1.0, 0.0])
    with pytest.raises(LunaInputError, match="sigmas of your own"):
        sd15.detail(image, face_and_hand(), concepts=(Concept("hand", denoise=0.3),), sigmas=sigmas, model=model)
    assert not calls
    refined = sd15.detail(image, face_and_hand(), concepts=(Concept("hand", denoise=0.0),), sigmas=sigmas)[0]
    assert changed_in(image, refined, RIGHT) == 0
    assert changed_in(image, refined, LEFT) > 0.01


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_every_scheduler_gives_noise_levels_or_says_why_not(kind: str) -> None:
    model = tiny.unet() if kind == "unet" else tiny.flux()
    refused: dict[str, str] = {}
    for scheduler in comfy.samplers.SCHEDULER_NAMES:
        for steps in (1, 2, 3, 1500):
            settings = SamplingSettings(0, steps, 4.0, "euler", scheduler, 1.0)
            try:
                sigmas = ksampler_recipe(model, [], [], settings).sigmas
            except LunaInputError as error:
                refused[f"scheduler '{scheduler}' has no noise levels for {steps} steps"] = str(error)
                continue
            assert torch.isfinite(sigmas).all()
            assert len(sigmas) > 1
    assert "scheduler 'kl_optimal' has no noise levels for 1 steps" in refused
    assert all(said.startswith(start) for start, said in refused.items())


def test_a_scheduler_without_levels_is_named_before_anything_is_sampled(sd15: Studio) -> None:
    model, calls = counting(sd15.model)
    settings = {"steps": 1, "denoise": 1.0, "scheduler": "kl_optimal", "model": model}
    with pytest.raises(LunaInputError, match="scheduler 'kl_optimal' has no noise levels for 1 steps"):
        sd15.detail(photograph(), face_and_hand(), **settings)
    with pytest.raises(LunaInputError, match="scheduler 'kl_optimal' has no noise levels for 1 steps"):
        sd15.detail(
            photograph(), face_and_hand(), concepts=(Concept("hand", denoise=1.0),), **(settings | {"denoise": 0.4})
        )
    assert not calls


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 2.0], [1.0, 1.0], [float("nan"), 0.0], [float("inf"), 0.0]])
def test_own_sigmas_that_no_sampler_can_use_are_refused(sd15: Studio, sigmas: list[float]) -> None:
    with pytest.raises(LunaInputError, match="sigmas"):
        sd15.detail(photograph(), face_and_hand(), sigmas=torch.tensor(sigmas))


@pytest.mark.parametrize(
    ("size", "target", "multiple", "said"),
    [((10, 2000), 1024, 64, "2000x10 px became 1024x64 px"), ((60, 90), 2048, 64, None), ((60, 90), 2048, 1, None)],
)
def test_prep_upscale_says_when_a_picture_is_stretched(
    size: tuple[int, int], target: int, multiple: int, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    LunaPrepUpscale.execute(torch.rand(1, *size, 3), target, "bicubic", multiple)
    assert (said in caplog.text) if said else not caplog.text


def test_a_hint_of_another_aspect_gives_its_middle_as_in_a_ksampler() -> None:
    """Hints of which each px holds its column; ComfyUI crops the sides of one that is too wide, masks are stretched."""
    from luna_refinement.batching.crop_plan import CropSettings, plan_detections
    from luna_refinement.batching.spatial import PictureGuidance

    (region,) = plan_detections(
        [Detection(0, (0.0, 0.0, 64.0, 64.0))], 64, 64, 1, CropSettings(64, 0.0, 0), seed=0
    ).regions

    class Hint:
        cond_hint_original = (torch.arange(128.0) / 128).expand(1, 3, 64, 128).clone()
        previous_controlnet = None

        def copy(self) -> Any:
            return Hint()

    shown = PictureGuidance(64, 64, 1, 8).control(Hint(), [region]).cond_hint_original[0, 0, 0]
    core = comfy.utils.common_upscale(Hint.cond_hint_original, 64, 64, "bilinear", "center")[0, 0, 0]
    assert float((shown - core).abs().max()) < 1e-6
    mask = Hint.cond_hint_original[:, 0]
    weight = PictureGuidance(64, 64, 1, 8).weight({"mask": mask}, region, (64, 64))
    assert weight is not None
    assert weight[0, 1:-1].tolist() == pytest.approx(((torch.arange(64.0) + 0.25) / 64)[1:-1].tolist(), abs=0.01)
