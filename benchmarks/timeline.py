"""Where the time of a run goes: a timeline of ComfyUI's models, and of what lies between their calls."""

import copy
from collections.abc import Callable
from typing import Any

from gpu_clock import now


class Timeline:
    """When ComfyUI's models were entered and left; what lies between goes by its neighbours."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, float]] = []

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.calls.append((name, start, now()))

        return timed

    def watched(self, models: Any) -> dict[str, Any]:
        """Copies of the model, VAE and CLIP vision of ``models`` whose calls are noted."""
        model = models.model.clone()
        model.set_model_unet_function_wrapper(
            self.around("UNet", lambda apply, given: apply(given["input"], given["timestep"], **given["c"]))
        )
        vae, clip_vision = copy.copy(models.vae), copy.copy(models.clip_vision)
        vae.encode = self.around("VAE encode", models.vae.encode)
        vae.decode = self.around("VAE decode", models.vae.decode)
        clip_vision.encode_image = self.around("CLIP vision", models.clip_vision.encode_image)
        return {"model": model, "vae": vae, "clip_vision": clip_vision}

    def stages(self, start: float, stop: float) -> dict[str, float]:
        """Seconds by stage, from ``start`` to ``stop``."""
        found: dict[str, float] = {}
        before, since = "", start
        for name, entered, left in (*self.calls, ("", stop, stop)):
            gap = _gap(before, name)
            for stage, seconds in ((gap, entered - since), (name, left - entered)):
                found[stage] = found.get(stage, 0.0) + seconds
            before, since = name, left
        found.pop("", None)
        return found


def _gap(before: str, after: str) -> str:
    if before == "VAE decode":
        return "colour match, paste"
    if before == "UNet":
        return "sampler, per step"
    return {"VAE encode": "check, plan, cut", "CLIP vision": "look"}.get(after, "tokens, keys and values, noise")


MODELS = ("UNet", "VAE encode", "VAE decode", "CLIP vision")
STAGES = ("check, plan, cut", "VAE encode", "look", "CLIP vision", "tokens, keys and values, noise", "UNet",
          "sampler, per step", "VAE decode", "colour match, paste")  # fmt: skip
