"""Running out of memory, for all rooms: what counts as it, and how work goes on in smaller parts."""

import gc
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import comfy.model_management

from .errors import LunaRuntimeError

log = logging.getLogger("luna")

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, as far as this ComfyUI can tell.

    Newer releases also know the form in which a device reports it late (``torch.AcceleratorError``), and clear it.
    """
    management = comfy.model_management
    if hasattr(management, "is_oom"):
        return bool(management.is_oom(error))
    return isinstance(error, management.OOM_EXCEPTION)


class MemoryLimit:
    """Does work in parts that fit in memory, and remembers what did not.

    A part that does not fit is halved, after what it left behind was freed; no later part is larger.

    Args:
        what: plural of what the parts are made of, for the log.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._most_units: int | None = None

    def at_most(self, wanted: int, units_per_item: int = 1) -> int:
        """Items to do at once where ``wanted`` would be welcome; at least 1.

        ``units_per_item`` compares items of different size, for example by their px.
        """
        if self._most_units is None:
            return wanted
        return max(1, min(wanted, self._most_units // units_per_item))

    def parts(
        self,
        items: list[Item],
        most: int,
        work: Callable[[list[Item]], Result],
        no_room: LunaRuntimeError,
        units_per_item: int = 1,
    ) -> Iterator[tuple[list[Item], Result]]:
        """Does the work on all items in order; yields each part with its result.

        Args:
            items: what to do.
            most: items to do at once where memory allows.
            work: called with one part at a time, and again with a smaller one where it ran out of memory.
            no_room: raised when not even one item fits.
            units_per_item: see ``at_most``.
        """
        done = 0
        while done < len(items):
            part = items[done : done + self.at_most(most, units_per_item)]
            try:
                result = work(part)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            else:
                yield part, result
                done += len(part)
                continue
            # outside the except block, so that the traceback no longer holds the tensors of the failed call
            if len(part) == 1:
                raise no_room
            fewer = (len(part) + 1) // 2
            self._most_units = fewer * units_per_item
            _free()
            log.warning("not enough memory for %d %s at once, going on with %d", len(part), self.what, fewer)


def _free() -> None:
    """Gives what failed calls left behind back to the device: objects in reference cycles, and cached blocks."""
    gc.collect()
    comfy.model_management.soft_empty_cache()
