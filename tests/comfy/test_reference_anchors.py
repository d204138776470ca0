"""Rows anchored by reference latents of their own: on models whose network reads these, built of ComfyUI's classes."""

from typing import Any

import comfy.model_base
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy.model_management import get_free_memory
from comfy.sd1_clip import SD1Tokenizer
from comfy_extras.nodes_custom_sampler import DualCFGGuider
from comfy_extras.nodes_edit_model import ReferenceLatent
from luna_refinement.batching.comfy_chunks import row_bytes
from luna_refinement.batching.comfy_latents import latent_shape
from luna_refinement.batching.comfy_reference import reads_references
from luna_refinement.batching.concepts import Concept
from luna_refinement.batching.crop_plan import CropSettings, plan_detections
from luna_refinement.batching.grid import TileSettings, plan_tiles
from luna_refinement.batching.noise import row_noise
from luna_refinement.errors import LunaInputError
from torch import Tensor

from harness import tiny
from harness.picture_text import picture_clip
from harness.refining import Studio, counting, detections, difference, labelled, photograph
from harness.still_models import FAMILIES

BOUND = 1e-4
EFFECT = 5e-5
"""Of px, 0..1: models this small move little, but far more than rounding does."""

SIDE = 64
SAMPLING = {"seed": 7, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.7}
USUAL = SAMPLING | {"ip_adapter": None, "clip_vision": None, "anchor_mode": "reference"}
PICTURE = photograph(height=400, width=300)[:, 250:390, 40:240]


def settings_of(name: str) -> dict[str, Any]:
    """A refiner's model, vae and prompts of a family."""
    family = FAMILIES[name]
    prompts = {prompt: family.conditioning(prompt) for prompt in ("positive", "negative")}
    return {"model": family.model(), "vae": family.vae(), **prompts}


@pytest.fixture(params=["flux", "flux2", "omnigen2", "qwen_image", "z_image"])
def family(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A refiner's settings for one family."""
    if not FAMILIES[request.param].is_known:
        pytest.skip("this ComfyUI does not know the family")
    settings = settings_of(request.param)
    if request.param == "z_image" and not reads_references(settings["model"]):
        pytest.skip("this ComfyUI's Z-Image reads no reference latents (added after 0.3.75)")
    return settings | USUAL


@pytest.fixture
def flux() -> dict[str, Any]:
    return settings_of("flux") | USUAL


def rows(studio: Studio, settings: dict[str, Any], *concepts: Concept, **changes: Any) -> Tensor:
    """[3,SIDE,SIDE,3]: the three refined crops."""
    image = photograph()
    return studio.detail(image, labelled(image, "abc"), crop_size=SIDE, concepts=concepts, **(settings | changes))[3]


def test_a_reference_reaches_its_own_row_alone(sd15: Studio, family: dict[str, Any]) -> None:
    own = rows(sd15, family)
    changed = rows(sd15, family, Concept("b", image=PICTURE))
    assert torch.isfinite(own).all()
    assert torch.equal(own[[0, 2]], changed[[0, 2]])
    assert difference(own[1], changed[1]) > EFFECT


def test_rows_with_references_of_their_own_are_not_rows_with_one_for_all(sd15: Studio, family: dict[str, Any]) -> None:
    image = photograph()
    first = sd15.detail(image, labelled(image, "abc"), crop_size=SIDE, **family)[2][:1]  # the crop of row 0
    own, shared = rows(sd15, family), rows(sd15, family, Concept("*", image=first))
    assert difference(own[0], shared[0]) <= 1e-5
    assert all(difference(own[row], shared[row]) > EFFECT for row in (1, 2))


def test_rows_with_references_share_a_call_and_come_out_alike_alone(sd15: Studio, family: dict[str, Any]) -> None:
    model, calls = counting(family["model"])
    together = rows(sd15, family, model=model)
    assert calls == [6, 6]  # three rows with both prompts, twice
    assert difference(together, rows(sd15, family, chunk_size=1)) <= BOUND


def test_tiles_have_references_of_their_own(sd15: Studio, family: dict[str, Any]) -> None:
    image = photograph(height=96, width=160)
    settings = family | {"tile_size": SIDE}
    together = sd15.chess(image, **settings)[0]
    assert torch.isfinite(together).all()
    assert difference(together, sd15.chess(image, chunk_size=1, **settings)[0]) <= BOUND
    assert difference(together, sd15.chess(image, **(settings | {"anchor_mode": "ip_adapter"}))[0]) > EFFECT


def referring(conds: list[Any], *latents: Tensor) -> list[Any]:
    """The conditioning with latents appended by ComfyUI's own node, one after the other."""
    for latent in latents:
        node: Any = ReferenceLatent
        given = {"conditioning": conds, "latent": {"samples": latent}}
        conds = node.execute(**given).result[0] if hasattr(node, "execute") else node().append(**given)[0]
    return conds


def by_luna(studio: Studio, node: str, settings: dict[str, Any]) -> Tensor:
    image = photograph(height=SIDE, width=SIDE)
    if node == "chess":
        return studio.chess(image, tile_size=SIDE, **settings)[0]
    whole = detections(image, [(0.0, 0.0, float(SIDE), float(SIDE))])
    return studio.detail(image, whole, crop_size=SIDE, padding=0.0, feather=0, mask_latent=False, **settings)[0]


def noise_of(node: str, latent: Tensor) -> Tensor:
    plan = plan_tiles(SIDE, SIDE, 1, TileSettings(SIDE, 0.125, 1.0), SAMPLING["seed"])
    if node == "detail":
        whole = detections(torch.zeros(1, SIDE, SIDE, 3), [(0.0, 0.0, float(SIDE), float(SIDE))])
        plan = plan_detections(whole.items, SIDE, SIDE, 1, CropSettings(SIDE, 0.0, 0), SAMPLING["seed"])
    return row_noise([plan.regions[0].seed], latent.shape[1:])


def by_core(settings: dict[str, Any], node: str, given: tuple[Tensor, ...] = (), own_last: bool = True) -> Tensor:
    """One row by ReferenceLatent on both prompts and a KSampler."""
    model, vae, image = settings["model"], settings["vae"], photograph(height=SIDE, width=SIDE)
    with torch.inference_mode():
        latent = vae.encode(image)
        latents = (*given, latent) if own_last else (latent, *given)
        sampler = comfy.samplers.KSampler(
            model, SAMPLING["steps"], torch.device("cpu"), SAMPLING["sampler_name"], SAMPLING["scheduler"],
            SAMPLING["denoise"], model.model_options,
        )  # fmt: skip
        positive, negative = (referring(settings[name], *latents) for name in ("positive", "negative"))
        sampled = sampler.sample(
            noise_of(node, latent), positive, negative, cfg=settings["cfg"], latent_image=latent, disable_pbar=True,
            seed=1,
        )  # fmt: skip
        return vae.decode(sampled)[..., :3]


@pytest.mark.parametrize("node", ["detail", "chess"])
def test_one_row_is_what_reference_latent_and_a_ksampler_give(sd15: Studio, family: dict[str, Any], node: str) -> None:
    mine = by_luna(sd15, node, family)
    assert difference(mine, by_core(family, node)) <= 1e-5
    assert difference(mine, by_luna(sd15, node, family | {"anchor_mode": "ip_adapter"})) > EFFECT


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_references_that_a_prompt_carries_come_first(sd15: Studio, family: dict[str, Any], cfg: float) -> None:
    channels, *frames, _, _ = latent_shape(family["vae"], SIDE, SIDE)
    generator = torch.Generator().manual_seed(5)
    given = tuple(torch.randn(1, channels, *frames, 6, width, generator=generator) for width in (12, 16))
    settings = family | {name: referring(family[name], *given) for name in ("positive", "negative")} | {"cfg": cfg}
    mine = by_luna(sd15, "detail", settings)
    assert difference(mine, by_core(family | {"cfg": cfg}, "detail", given)) <= 1e-5
    assert difference(mine, by_core(family | {"cfg": cfg}, "detail", given, own_last=False)) > EFFECT
    assert difference(mine, by_luna(sd15, "detail", settings | {"anchor_mode": "ip_adapter"})) > EFFECT


def test_under_dual_guidance_the_negative_prompt_sees_no_reference(sd15: Studio) -> None:
    """What lies between the middle prompt and the negative is then the picture's part, as in core's OmniGen2 graphs."""
    family = FAMILIES["omnigen2"]
    settings = settings_of("omnigen2") | USUAL
    model, latent = settings["model"], settings["vae"].encode(photograph(height=SIDE, width=SIDE))
    middle = family.conditioning("middle")

    def guider(*conds: list[Any]) -> Any:
        node: Any = DualCFGGuider
        given = (model, *conds, 4.0, 2.0, "regular")
        return node.execute(*given).result[0] if hasattr(node, "execute") else node().get_guider(*given)[0]

    prompts = settings["positive"], middle, settings["negative"]
    mine = by_luna(sd15, "chess", settings | {"guider": guider(*prompts)})
    with torch.inference_mode():
        reference = guider(*(referring(conds, latent) for conds in prompts[:2]), prompts[2])
        sigmas = comfy.samplers.KSampler(
            model, 2, torch.device("cpu"), "euler", "normal", SAMPLING["denoise"], model.model_options
        ).sigmas
        sampled = reference.sample(
            noise_of("chess", latent), latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1
        )
        assert difference(mine, settings["vae"].decode(sampled)[..., :3]) <= 1e-5


def test_a_concept_of_weight_zero_leaves_its_rows_without_reference(sd15: Studio, flux: dict[str, Any]) -> None:
    model, calls = counting(flux["model"])
    mixed = rows(sd15, flux, Concept("b", ip_adapter_weight=0.0), model=model)
    assert sorted(calls) == [2, 2, 4, 4]
    plain, referred = rows(sd15, flux, anchor_mode="ip_adapter"), rows(sd15, flux)
    assert difference(mixed[[0, 2]], referred[[0, 2]]) <= BOUND
    assert difference(mixed[1], plain[1]) <= BOUND
    assert difference(plain[1], referred[1]) > EFFECT


def test_a_concepts_picture_of_another_aspect_is_cropped_at_its_centre(sd15: Studio, flux: dict[str, Any]) -> None:
    wide = torch.cat([torch.zeros(1, 140, 30, 3), PICTURE[:, :, 30:170], torch.ones(1, 140, 30, 3)], dim=2)
    middle, other = (rows(sd15, flux, Concept("*", image=image)) for image in (PICTURE[:, :, 30:170], wide))
    assert torch.equal(middle, other)


def test_the_model_is_left_as_it_was_and_the_same_inputs_give_the_same(sd15: Studio, flux: dict[str, Any]) -> None:
    before = {key: value.clone() for key, value in flux["model"].model.state_dict().items()}
    first = rows(sd15, flux)
    assert torch.equal(first, rows(sd15, flux))
    assert all(torch.equal(value, before[key]) for key, value in flux["model"].model.state_dict().items())
    assert flux["model"].patches == {}
    assert "reference_latents" not in flux["positive"][0][1]


def test_px_outside_and_a_denoise_of_zero_keep_their_bits(sd15: Studio, flux: dict[str, Any]) -> None:
    image = photograph()
    refined, mask = sd15.detail(image, labelled(image, "abc"), **flux)[:2]
    assert torch.equal(refined[mask == 0], image[mask == 0])
    assert torch.equal(sd15.detail(image, labelled(image, "abc"), **(flux | {"denoise": 0.0}))[0], image)


def test_references_are_counted_where_rows_are_told_to_fit(sd15: Studio, flux: dict[str, Any]) -> None:
    """On a model of which five rows fill the memory, three share a call; with references they are twice as large."""
    shape = (16, SIDE // 8, SIDE // 8)
    network = flux["model"].model
    network.memory_usage_factor *= get_free_memory(torch.device("cpu")) / 5 / row_bytes(flux["model"], shape)
    largest = {}
    for mode in ("ip_adapter", "reference"):
        model, calls = counting(flux["model"])
        rows(sd15, flux, model=model, anchor_mode=mode)
        largest[mode] = max(calls)
    assert largest == {"ip_adapter": 3, "reference": 2}


def said(caplog: pytest.LogCaptureFixture) -> str:
    text = caplog.text
    caplog.clear()
    return text


def test_what_cannot_act_is_said(sd15: Studio, flux: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    image = photograph(height=SIDE, width=SIDE)
    adapter = {"ip_adapter": sd15.plus, "clip_vision": sd15.clip_vision}
    unet = {name: USUAL[name] for name in ("ip_adapter", "clip_vision")}

    def run(settings: dict[str, Any], mode: str) -> tuple[Tensor, str]:
        result = sd15.chess(image, tile_size=SIDE, **(settings | {"anchor_mode": mode}))[0]
        return result, said(caplog)

    text_only, notice = run(flux, "ip_adapter")
    assert "from text only" in notice
    assert "anchor_mode reference anchors them" in notice
    assert "anchor_mode reference anchors them" in run(flux | adapter, "ip_adapter")[1]
    referred, notice = run(flux, "reference")
    assert notice == ""
    both, notice = run(flux | adapter, "both")
    assert "to act on; those of XLabs and InstantX do: reference latents alone anchor the regions" in notice
    assert torch.equal(both, referred)
    beside, notice = run(flux | adapter, "reference")
    assert "ip_adapter does not act, because anchor_mode is reference" in notice
    assert torch.equal(beside, referred)
    assert not torch.equal(text_only, referred)

    plain, notice = run(unet, "ip_adapter")
    assert "from text only" in notice
    assert "reference" not in notice
    degraded, notice = run(unet | adapter, "reference")
    assert "model reads no reference latents, which anchor_mode reference needs" in notice
    assert "from text only" in notice
    assert torch.equal(plain, degraded)
    anchored, notice = run(adapter, "ip_adapter")
    assert notice == ""
    alone, notice = run(adapter, "both")
    assert "model reads no reference latents" in notice
    assert "from text only" not in notice
    assert torch.equal(anchored, alone)


def test_concepts_are_told_what_references_do_not_have(
    sd15: Studio, flux: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows(sd15, flux, Concept("b", ip_adapter_weight=0.7))
    assert "a reference latent has no strength" in said(caplog)
    rows(sd15, flux, Concept("b", ip_adapter_weight=0.0), Concept("a", image=PICTURE))
    assert "concepts set" not in said(caplog)
    rows(sd15, flux, Concept("b", image=PICTURE), anchor_mode="ip_adapter")
    assert "concepts set an anchor, but rows are not anchored" in said(caplog)


@pytest.mark.parametrize("node", ["detail", "chess"])
def test_an_unknown_mode_is_refused(sd15: Studio, flux: dict[str, Any], node: str) -> None:
    with pytest.raises(LunaInputError, match="anchor_mode is 'redux': choose one of ip_adapter, reference, both"):
        by_luna(sd15, node, flux | {"anchor_mode": "redux"})


def test_only_networks_that_take_references_are_said_to_read_them() -> None:
    """Lumina 2 shares a class with Z-Image, and Chroma inherits what Flux is handed, but neither network takes any."""
    assert not reads_references(tiny.unet())
    assert not reads_references(FAMILIES["lumina2"].model())
    chroma = tiny.flux()
    chroma.model.diffusion_model = comfy.model_base.comfy.ldm.chroma.model.Chroma.__new__(
        comfy.model_base.comfy.ldm.chroma.model.Chroma
    )
    torch.nn.Module.__init__(chroma.model.diffusion_model)
    assert not reads_references(chroma)


class TestTextThatReadsThePicture:
    """clip and prompt: the words are encoded for each row with its picture, by Qwen-Image's own tokenizer, small."""

    @pytest.fixture(scope="class")
    def clip(self) -> Any:
        return picture_clip()

    def by_hand(self, clip: Any, settings: dict[str, Any], words: str, picture: Tensor | None = None) -> dict[str, Any]:
        """The settings with prompts encoded as the refiner should do it for a picture [1,SIDE,SIDE,3], or its own."""
        picture = photograph(height=SIDE, width=SIDE) if picture is None else picture
        shown = comfy.utils.common_upscale(picture.movedim(-1, 1), 384, 384, "area", "disabled").movedim(1, -1)
        with torch.inference_mode():
            positive, negative = (
                clip.encode_from_tokens_scheduled(clip.tokenize(said, images=[shown])) for said in (words, "")
            )
        return settings | {"positive": positive, "negative": negative}

    @pytest.mark.parametrize("node", ["detail", "chess"])
    def test_one_row_is_what_encoding_by_hand_gives(
        self, sd15: Studio, flux: dict[str, Any], clip: Any, node: str
    ) -> None:
        words = "make it a drawing"
        mine = by_luna(sd15, node, flux | {"clip": clip, "prompt": words})
        assert difference(mine, by_luna(sd15, node, self.by_hand(clip, flux, words))) <= 1e-5
        assert difference(mine, by_luna(sd15, node, flux)) > EFFECT
        assert difference(mine, by_luna(sd15, node, flux | {"clip": clip, "prompt": "a photograph"})) > 1e-6

    def test_a_concepts_picture_is_the_one_that_the_text_reads(
        self, sd15: Studio, flux: dict[str, Any], clip: Any
    ) -> None:
        picture = PICTURE[:, :SIDE, :SIDE]
        settings = flux | {"concepts": (Concept("*", image=picture),)}
        mine = by_luna(sd15, "detail", settings | {"clip": clip, "prompt": "sharper"})
        assert difference(mine, by_luna(sd15, "detail", self.by_hand(clip, settings, "sharper", picture))) <= 1e-5
        assert difference(mine, by_luna(sd15, "detail", self.by_hand(clip, settings, "sharper"))) > 1e-6

    def test_a_picture_reaches_the_text_of_its_own_row_alone(
        self, sd15: Studio, flux: dict[str, Any], clip: Any
    ) -> None:
        settings = flux | {"clip": clip, "prompt": "sharper"}
        model, calls = counting(settings["model"])
        own, changed = rows(sd15, settings, model=model), rows(sd15, settings, Concept("b", image=PICTURE))
        assert calls == [3] * 4  # texts of positive and negative differ in length
        assert torch.equal(own[[0, 2]], changed[[0, 2]])
        assert difference(own[1], changed[1]) > EFFECT
        assert difference(own, rows(sd15, settings, chunk_size=1)) <= BOUND

    def test_what_else_a_prompt_carries_stays(self, sd15: Studio, flux: dict[str, Any], clip: Any) -> None:
        left = [[text, fields | {"mask": torch.eye(SIDE)[None]}] for text, fields in flux["positive"]]
        settings = flux | {"clip": clip, "prompt": "sharper", "positive": left}
        by_hand = self.by_hand(clip, flux, "sharper")
        masked = [[text, fields | {"mask": torch.eye(SIDE)[None]}] for text, fields in by_hand["positive"]]
        mine = by_luna(sd15, "chess", settings)
        assert difference(mine, by_luna(sd15, "chess", by_hand | {"positive": masked})) <= 1e-5
        assert difference(mine, by_luna(sd15, "chess", by_hand)) > 1e-6

    def test_a_concepts_own_prompt_keeps_its_text(self, sd15: Studio, flux: dict[str, Any], clip: Any) -> None:
        own = FAMILIES["flux"].conditioning("of b")
        settings = flux | {"clip": clip, "prompt": "sharper", "cfg": 1.0}
        mixed = rows(sd15, settings, Concept("b", positive=own))
        assert difference(mixed[[0, 2]], rows(sd15, settings)[[0, 2]]) <= BOUND
        assert difference(mixed[1], rows(sd15, flux | {"positive": own, "cfg": 1.0})[1]) <= BOUND

    @pytest.mark.parametrize(
        ("message", "change"),
        [
            ("clip is connected but prompt is empty", {"prompt": " "}),
            ("clip is 'clip': connect the CLIP", {"clip": "clip"}),
            ("positive holds 2 prompts, but with clip one", {"positive": FAMILIES["flux"].conditioning("a") * 2}),
            ("positive holds text 24 wide, model reads text 16 wide", {"clip": None}),
        ],
    )
    def test_bad_input_is_refused(
        self, sd15: Studio, flux: dict[str, Any], clip: Any, message: str, change: dict[str, Any]
    ) -> None:
        given = {"clip": clip, "prompt": "sharper"} | change
        settings = flux | given | {"clip": given["clip"] or picture_clip(24)}
        model, calls = counting(settings["model"])
        with pytest.raises(LunaInputError, match=message):
            by_luna(sd15, "detail", settings | {"model": model})
        assert calls == []

    def test_what_does_not_act_is_said(
        self, sd15: Studio, flux: dict[str, Any], clip: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        for change, notice in (
            ({"prompt": "sharper"}, "prompt acts only with clip"),
            ({"clip": clip, "anchor_mode": "ip_adapter"}, "clip does not act, because regions have no reference"),
            ({"clip": comfy_clip_without_pictures(clip)}, "clip does not act, because its tokenizer reads no pictures"),
        ):
            assert torch.isfinite(by_luna(sd15, "chess", flux | change)).all()
            assert notice in said(caplog)


def comfy_clip_without_pictures(clip: Any) -> Any:
    """The CLIP with a tokenizer that takes words alone, as those of most models do."""
    words_only = clip.clone()
    words_only.tokenizer = SD1Tokenizer()
    return words_only
