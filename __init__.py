"""Luna Refinement: ComfyUI nodes that refine pictures in pixel space, in one batch with an anchor per row."""

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES

WEB_DIRECTORY = "./web"


class LunaExtension(ComfyExtension):
    """The pack as ComfyUI's V3 loader sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)


def comfy_entrypoint() -> LunaExtension:
    return LunaExtension()
