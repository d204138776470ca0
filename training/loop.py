"""A training loop that can be stopped at any time and goes on where it was: a step's data follow from its number."""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

SAVE_SECONDS = 120.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: all of them.
        learning_rate: after the first ``warm_up`` steps; it falls to a fiftieth by half a cosine.
        ema: most that the running mean of the weights keeps of itself at a step.
    """

    steps: int
    learning_rate: float
    warm_up: int = 100
    ema: float = 0.998

    def rate(self, step: int) -> float:
        fall = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up) * max(0.02, fall)

    def keep(self, step: int) -> float:
        return min(self.ema, step / (step + 20))


class Trainer:
    """Runs a schedule over some modules and keeps the running mean of their weights.

    Args:
        name: of the checkpoint.
        modules: what learns; their weights are those of the last step.
        schedule: how long and how fast.
        folder: where the checkpoint lies.
    """

    def __init__(self, name: str, modules: Mapping[str, nn.Module], schedule: Schedule, folder: Path) -> None:
        self.name = name
        self.modules = dict(modules)
        self.schedule = schedule
        self.path = folder / f"{name}.pt"
        self.step = 0
        self.loss = math.nan
        parameters = [parameter for module in self.modules.values() for parameter in module.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.mean = [parameter.detach().clone() for parameter in parameters]
        self._parameters = parameters
        if self.path.is_file():
            self._resume()

    def run(self, loss_at: Callable[[int], Tensor], until: int | None = None) -> None:
        """Trains up to step ``until``, by default to the end; ``loss_at(step)`` gives the loss of one batch."""
        last = self.schedule.steps if until is None else min(until, self.schedule.steps)
        saved = time.monotonic()
        with tqdm(total=self.schedule.steps, initial=self.step, desc=self.name, unit="step", mininterval=5) as bar:
            while self.step < last:
                self._learn(loss_at(self.step))
                bar.update()
                bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def _learn(self, loss: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.mean, [p.detach() for p in self._parameters], 1 - self.schedule.keep(self.step))
        value = loss.item()
        self.loss = value if math.isnan(self.loss) else 0.99 * self.loss + 0.01 * value
        self.step += 1

    @torch.no_grad()
    def use_mean(self) -> None:
        """Puts the running mean into the modules."""
        for parameter, mean in zip(self._parameters, self.mean, strict=True):
            parameter.copy_(mean)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save(
            {
                "step": self.step,
                "loss": self.loss,
                "modules": {name: module.state_dict() for name, module in self.modules.items()},
                "mean": self.mean,
                "optimizer": self.optimizer.state_dict(),
            },
            partial,
        )
        os.replace(partial, self.path)

    def _resume(self) -> None:
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(saved["modules"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.mean, self.step, self.loss = saved["mean"], saved["step"], saved["loss"]
