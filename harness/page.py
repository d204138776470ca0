"""ComfyUI's own web page in a headless browser: load graphs, read them back, queue them."""

import itertools
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from harness import workspace
from harness.browser import Browser, BrowserError
from harness.graphs import Graph
from harness.pictures import astronaut, write_pictures
from harness.server import ComfyServer

EXAMPLE_PICTURE = "example.png"  # ships in the input folder of every ComfyUI; the bundled workflows load it

_SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else the first visit opens the templates
    "Comfy.Workflow.ShowMissingModelsWarning": False,  # the published models are not here
    "Comfy.Window.UnloadConfirmation": False,  # a changed graph is left without a question
    "Comfy.Workflow.Persist": False,  # else newer pages bring the last graph back, over one that a test has loaded
}
_OPTIONAL_FILES = ("/user.css", "/api/userdata")  # asked for by the page itself; a new user has none
_BEFORE_START = """
    localStorage.setItem('vueNodesBannerDismissed', 'true')
    // the page's own state: execution, help, nodes
    window.store = name =>
        document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get(name)
"""
_READY = "window.app?.vueAppReady && window.app.graph && window.LiteGraph?.registered_node_types?.LoadImage"


def fresh_base(folder: Path) -> Path:
    """A ComfyUI base directory without any user's settings, with the pack, the small models and pictures."""
    workspace.make_base(folder)
    workspace.link_folder(folder / "models", workspace.BASE / "models")
    write_pictures(folder / "input")
    astronaut().save(folder / "input" / EXAMPLE_PICTURE)
    settings = folder / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(_SETTINGS), encoding="utf-8")
    return folder


class ComfyPage:
    """The web page of a running server; a context manager.

    ``start_errors`` holds what the page reported while it started, ``errors`` what it reported since.
    """

    def __init__(self, server: ComfyServer, width: int = 1600, height: int = 900) -> None:
        self.server = server
        self.browser = Browser(server.url, width, height)
        self.start_errors: list[str] = []

    def __enter__(self) -> "ComfyPage":
        self.browser.__enter__()
        try:
            self.browser.command("Page.addScriptToEvaluateOnNewDocument", source=_BEFORE_START)
            self.reload()
        except BaseException:
            self.browser.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.browser.__exit__(kind, error, trace)

    @property
    def errors(self) -> list[str]:
        """What the console and failed requests reported since the page was ready."""
        self.browser.evaluate("new Promise(requestAnimationFrame)")  # reads the events that wait
        return [error for error in self.browser.errors if not any(path in error for path in _OPTIONAL_FILES)]

    def reload(self) -> None:
        """A page as after a fresh visit."""
        self.browser.errors.clear()
        self.browser.open()
        self.browser.wait_for(_READY)
        self.start_errors = [*self.browser.errors]
        self.browser.errors.clear()

    def speak(self, language: str) -> None:
        """Sets the language as the settings dialog does, and visits the page again."""
        self.set_setting("Comfy.Locale", language)

    def has_setting(self, name: str) -> bool:
        """Whether this page knows a setting."""
        return bool(self.browser.call("name => name in window.store('setting').settingsById", name))

    def set_setting(self, name: str, value: object) -> None:
        """Changes a setting as the settings dialog does, and visits the page again."""
        self.browser.call("(...change) => window.app.ui.settings.setSettingValueAsync(...change)", name, value)
        self.reload()

    def texts(self, node_type: str) -> tuple[str, dict[str, str]]:
        """What a new node of a kind shows: its title, and the label of every input."""
        title, labels = self.browser.call(
            """type => {
                const node = window.LiteGraph.createNode(type)
                const shown = entry => [entry.name, entry.label ?? entry.localized_name ?? entry.name]
                return [node.title, [...node.inputs ?? [], ...node.widgets ?? []].map(shown)]
            }""",
            node_type,
        )
        return title, dict(labels)

    def load_api(self, graph: Graph, name: str) -> None:
        """Loads an API graph the way the page does when such a file is dropped on it."""
        self.browser.call("(graph, name) => window.app.loadApiJson(graph, name)", graph, name)

    def load(self, workflow: dict[str, Any], name: str) -> None:
        """Loads a workflow in canvas form the way the page opens a template."""
        self.browser.call("(workflow, name) => window.app.loadGraphData(workflow, true, true, name)", workflow, name)
        self._settle()

    def open_saved(self, name: str) -> None:
        """Opens one of the user's own workflows by a click in the side bar, and waits until its graph is shown."""
        self.browser.evaluate("window.app.extensionManager.command.execute('Workspace.ToggleSidebarTab.workflows')")
        labels = "[...document.querySelectorAll('.comfyui-workflows-browse .node-label')]"
        names = json.dumps([name, f"{name}.json"])  # the page shows either
        named = f"{labels}.filter(label => {names}.includes(label.textContent.trim()))"
        self.browser.wait_for(f"{named}.length", 20)
        self.browser.evaluate(f"{named}[0].click()")
        self.browser.wait_for(f"window.store('workflow').activeWorkflow?.filename === {json.dumps(name)}", 20)
        self._settle()

    def _settle(self) -> None:
        """Waits while pictures of a new graph load and the view is fitted to it."""
        self.browser.evaluate("new Promise(done => setTimeout(done, 300))")

    def serialised(self) -> dict[str, Any]:
        """The graph in canvas form."""
        return dict(self.browser.evaluate("window.app.graph.serialize()"))

    def prompt(self) -> Graph:
        """The graph in API form, as the page would queue it."""
        return dict(self.browser.evaluate("window.app.graphToPrompt().then(prompt => prompt.output)"))

    def rectangles(self) -> dict[str, tuple[float, float, float, float]]:
        """Title of every node, prefixed by its id, to its outline with the title bar: x1, y1, x2, y2 in graph units."""
        found = self.browser.evaluate(
            """window.app.graph.nodes.map(({ id, title, pos: [x, y], size: [width, height] }) =>
                [`${id} ${title}`, [x, y - window.LiteGraph.NODE_TITLE_HEIGHT, x + width, y + height]])"""
        )
        return {title: tuple(box) for title, box in found}

    def overlapping(self) -> list[tuple[str, str]]:
        """Pairs of nodes that lie on one another."""
        return [
            (one, other)
            for (one, a), (other, b) in itertools.combinations(self.rectangles().items(), 2)
            if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
        ]

    def ungrouped(self) -> list[str]:
        """Nodes that no group surrounds."""
        groups = self.browser.evaluate(
            "window.app.graph.groups.map(({ pos: [x, y], size: [w, h] }) => [x, y, x + w, y + h])"
        )
        return [
            title
            for title, node in self.rectangles().items()
            if not any(g[0] <= node[0] and g[1] <= node[1] and node[2] <= g[2] and node[3] <= g[3] for g in groups)
        ]

    def missing_types(self) -> list[str]:
        """Types of nodes in the graph that the server does not offer."""
        return list(
            self.browser.evaluate(
                "window.app.graph.nodes.map(n => n.type).filter(t => !(t in window.LiteGraph.registered_node_types))"
            )
        )

    def set_widgets(self, graph: Graph) -> None:
        """Sets every widget of the shown graph that an API graph of the same ids has a plain value for."""
        self.browser.call(
            """graph => {
                for (const [id, { inputs }] of Object.entries(graph))
                    for (const widget of window.app.graph.getNodeById(Number(id)).widgets ?? [])
                        if (widget.name in inputs && !Array.isArray(inputs[widget.name])) {
                            widget.value = inputs[widget.name]
                            widget.callback?.(widget.value)
                        }
            }""",
            graph,
        )

    def queue(self, timeout_s: float = 300.0) -> dict[str, Any]:
        """Queues the shown graph from the page and waits for its end; returns the node outputs the page received.

        Raises BrowserError with the page's own words where the run fails.
        """
        outcome = self.browser.evaluate(
            """new Promise(async done => {
                const { api } = window.app
                const outputs = {}
                api.addEventListener('executed', ({ detail }) => { outputs[detail.node] = detail.output })
                api.addEventListener('execution_error', ({ detail }) => done({ error: detail.exception_message }))
                api.addEventListener('execution_success', () => done({ outputs }))
                await window.app.queuePrompt(0)
                const refused = (window.store('executionError') ?? window.store('execution')).lastNodeErrors ?? {}
                if (Object.keys(refused).length) done({ error: JSON.stringify(refused) })
            })""",
            timeout_s,
        )
        if "error" in outcome:
            raise BrowserError(f"{outcome['error']}\n{self.browser.errors}")
        return dict(outcome["outputs"])

    def shown_pictures(self, node_id: str) -> list[tuple[int, int]]:
        """Width and height in px of the pictures that a node of the shown graph displays, once they are loaded."""
        node = f"window.app.graph.getNodeById({int(node_id)})"
        self.browser.evaluate(f"window.app.canvas.centerOnNode({node})")  # the page loads pictures of what is in view
        self.browser.wait_for(f"{node}.imgs?.every(picture => picture.complete)", 60)
        script = f"{node}.imgs.map(p => [p.naturalWidth, p.naturalHeight])"
        return [(width, height) for width, height in self.browser.evaluate(script)]

    def node_elements(self) -> dict[str, tuple[str, list[tuple[int, int]]]]:
        """What Nodes 2.0 shows: by id, the text of a node's element, and width and height in px of its pictures."""
        found = self.browser.evaluate(
            """[...document.querySelectorAll('.lg-node[data-node-id]')].map(element => [
                element.dataset.nodeId,
                element.innerText,
                [...element.querySelectorAll('img')].map(picture => [picture.naturalWidth, picture.naturalHeight]),
            ])"""
        )
        return {node: (text, [(width, height) for width, height in pictures]) for node, text, pictures in found}

    def close_up(self, *titles: str, width: int = 800, height: int = 800) -> Image.Image:
        """A picture of the graph around groups, without the page's menus."""
        left, top = (self.browser.size[0] - width) // 2, (self.browser.size[1] - height) - 10
        self.browser.call(
            """(titles, left, top, width, height) => {
                const { canvas, graph } = window.app
                const { ds, canvas: { offsetLeft, offsetTop } } = canvas
                const groups = graph.groups.filter(group => titles.includes(group.title))
                const x1 = Math.min(...groups.map(({ pos }) => pos[0]))
                const y1 = Math.min(...groups.map(({ pos }) => pos[1]))
                const x2 = Math.max(...groups.map(({ pos, size }) => pos[0] + size[0]))
                const y2 = Math.max(...groups.map(({ pos, size }) => pos[1] + size[1]))
                ds.scale = Math.min(width / (x2 - x1 + 40), height / (y2 - y1 + 40))
                ds.offset[0] = (left + width / 2 - offsetLeft) / ds.scale - (x1 + x2) / 2
                ds.offset[1] = (top + height / 2 - offsetTop) / ds.scale - (y1 + y2) / 2
                canvas.setDirty(true, true)
                return new Promise(done => setTimeout(done, 500))
            }""",
            titles,
            left,
            top,
            width,
            height,
        )
        return self.browser.screenshot().crop((left, top, left + width, top + height))

    def help_page(self, node_type: str) -> str:
        """The HTML that the page's own help panel shows for a kind of node; raises BrowserError where it finds none."""
        answer = self.browser.call(
            """async type => {
                const pause = () => new Promise(done => setTimeout(done, 20))
                const help = window.store('nodeHelp')
                if (help) {
                    help.openHelp(window.store('nodeDef').nodeDefsByName[type])
                    do await pause(); while (help.isLoading)
                    return [help.error, help.renderedHelpHtml]
                }
                // newer pages show it beside the node that is selected
                const { canvas, graph } = window.app
                const shown = () => document.querySelector('.node-help-content')
                canvas.deselectAll()
                while (shown()) await pause()
                const node = window.LiteGraph.createNode(type)
                graph.add(node)
                canvas.selectNode(node)
                window.store('rightSidePanel').openPanel('info')
                for (let tries = 0; tries < 250 && !shown()?.querySelector('h1'); tries++) await pause()
                return [null, shown()?.innerHTML ?? '']
            }""",
            node_type,
        )
        if answer[0]:
            raise BrowserError(f"{node_type}: {answer[0]}")
        return str(answer[1])

    def browse_templates(self, pack: str) -> list[str]:
        """Opens the templates of a pack; names of those offered, once the pictures of all are loaded."""
        self.browser.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        texts = "[...document.querySelectorAll('[role=dialog] *')].filter(element => !element.children.length)"
        named = f"{texts}.filter(element => element.textContent.trim() === '{pack}')"
        self.browser.wait_for(f"{named}.length")
        self.browser.evaluate(f"{named}[0].click()")
        self.browser.wait_for(f"{named}.length > 1", 20)  # the list's heading beside the entry
        cards = "[...document.querySelectorAll('[data-testid^=template-workflow-]')]"
        loaded = f"{cards}.every(card => card.querySelector('img')?.naturalWidth > 0)"
        self.browser.wait_for(f"{cards}.length && {loaded}", 20)
        names = self.browser.evaluate(f"{cards}.map(card => card.dataset.testid.replace('template-workflow-', ''))")
        return [str(name) for name in names]

    def open_template(self, name: str) -> None:
        """Clicks an offered template and waits until its graph is shown."""
        self.browser.call("name => document.querySelector(`[data-testid=template-workflow-${name}]`).click()", name)
        self.browser.wait_for("!document.querySelector('[role=dialog]')", 20)
