"""JupyterLab and a headless Chromium, for tests and pictures: a server on a folder, a page on it, all ended by id.

The commands are those that were found to work as root, without the network, in a container.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).parents[1]
MODULES = ("jupyterlab", "ipykernel", "nbformat", "ipywidgets", "anywidget", "playwright")
CHROMIUM = [
    *["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"],
    *["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--disable-default-apps"],
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
_READY = """name => {
    const shown = window.jupyterapp?.shell?.currentWidget;
    const status = shown?.sessionContext?.session?.kernel?.connectionStatus;
    return shown?.context?.path === name && status === "connected";
}"""


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def missing() -> str:
    """What a browser test lacks here; nothing if it can run."""
    lacking = [name for name in MODULES if find_spec(name) is None]
    return ", ".join([*lacking, *([] if chromium() else ["chromium"])])


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook of code cells."""
    import nbformat

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, path)


# No requests to the outside, and every cell in the page, wherever it is scrolled to.
SETTINGS = {
    "apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}


@contextmanager
def server(folder: Path, private: Path) -> Iterator[str]:
    """JupyterLab on a folder, its settings and state in `private`; the address. Ended with its kernels, by its id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.open_browser": False,
        "IdentityProvider.token": "",
        "ServerApp.password": "",
        "ServerApp.allow_root": True,
        "ServerApp.disable_check_xsrf": True,
        "ServerApp.root_dir": str(folder),
        "LabApp.expose_app_in_browser": True,
        "LabApp.extension_manager": "readonly",
    }
    command = [sys.executable, "-m", "jupyterlab", *(f"--{key}={value}" for key, value in options.items())]
    homes = {name: str(private / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for extension, said in SETTINGS.items():
        settings = Path(homes["JUPYTER_CONFIG_DIR"]) / "lab/user-settings/@jupyterlab" / extension
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps(said))
    with (private / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **homes, "PYTHONPATH": path}, stdout=log, stderr=log, start_new_session=True
        )
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the `finally` below runs
    try:
        _wait_for(f"http://127.0.0.1:{port}/api", process, private / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        signal.signal(signal.SIGTERM, before)
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(5)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait(5)


@contextmanager
def marimo(notebook: Path) -> Iterator[str]:
    """marimo running a notebook of its own, as an app; the address. Ended with its kernel, by its id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--headless", "--no-token", "--host", "127.0.0.1", "--port", str(port), str(notebook)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    log = notebook.with_suffix(".log")
    with log.open("w") as out:
        command = [sys.executable, "-m", "marimo", "--quiet", "run", *options]
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdout=out, stderr=out, start_new_session=True
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(10)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue


def _wait_for(address: str, process: subprocess.Popen, log: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(address, timeout=2) as answer:
                json.load(answer)
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")


@contextmanager
def browser(private: Path, width: int = 1500, height: int = 1300, scale: int = 1) -> Iterator[Any]:
    """A page of a headless Chromium with a profile of its own; scale: points of the screen to a pixel."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            str(private / "profile"),
            executable_path=chromium(),
            headless=True,
            args=CHROMIUM,
            viewport={"width": width, "height": height},
            device_scale_factor=scale,
        )
        try:
            yield context.pages[0] if context.pages else context.new_page()
        finally:
            context.close()


def run_notebook(page: Any, address: str, name: str, seconds: float = 600) -> None:
    """Open a notebook and start running all its cells; what it shows is for the caller to wait for."""
    page.goto(f"{address}/lab/tree/{name}?reset", timeout=seconds * 1000)
    page.wait_for_function(_READY, arg=name, timeout=seconds * 1000)
    command(page, "notebook:run-all-cells")


def command(page: Any, name: str, **arguments: Any) -> None:
    """Fire one of JupyterLab's commands, and do not wait: its promise has no time-out."""
    page.evaluate(
        "([name, args]) => { window.jupyterapp.commands.execute(name, args); return null; }", [name, arguments]
    )


def shown(page: Any, selector: str) -> None:
    """Wait until a notebook shows something; AssertionError with what a cell raised instead, where one did."""
    error = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
    page.locator(selector).or_(error).first.wait_for()
    assert not error.count(), error.first.inner_text()[-2000:]


_PAGE = """<!doctype html><html><head><meta charset="utf-8"><style>{dark}{style}</style></head>
<body><div id="root"></div><script type="module">
{script}
const traits = JSON.parse(await window.kernel("{{}}"))[0];
const changed = {{}};
const on = {{}};
const tell = (found) => {{
  const names = Object.keys(found).filter((name) => JSON.stringify(traits[name]) !== JSON.stringify(found[name]));
  Object.assign(traits, found);
  for (const name of names) for (const call of on[`change:${{name}}`] || []) call();
}};
const model = {{
  get: (name) => traits[name],
  set: (name, value) => {{ traits[name] = value; changed[name] = value; }},
  on: (name, call) => (on[name] ||= []).push(call), off: () => {{}},
  save_changes: async () => {{
    const sent = JSON.stringify(changed);
    for (const name of Object.keys(changed)) delete changed[name];
    for (const found of JSON.parse(await window.kernel(sent))) tell(found);
  }},
}};
render({{ model, el: document.getElementById("root") }});
</script></body></html>"""


def put_widget(page: Any, explorer: Any, dark: bool = False) -> None:
    """The widget on a page of its own, its traits here: what a notebook's kernel and page do, without either."""
    from ckptlab.widgets.explorer import STATIC

    script, style = ((STATIC / name).read_text(encoding="utf-8") for name in ("explorer.js", "explorer.css"))
    synced = [name for name in explorer.keys if not name.startswith("_")]

    views: list[Any] = []
    explorer.observe(lambda change: views.append(change["new"]), "view")

    def kernel(sent: str) -> str:
        views.clear()
        explorer.set_state(json.loads(sent))
        explorer.settled()
        state = explorer.get_state(synced)
        return json.dumps([{**state, "view": view} for view in views or [state["view"]]])

    page.kernels = [*getattr(page, "kernels", []), kernel]
    if len(page.kernels) == 1:
        page.expose_function("kernel", lambda sent: page.kernels[-1](sent))
    ground = ":root{color-scheme:dark;background:#111;color:#ddd}" if dark else ":root{color-scheme:light}"
    page.set_content(_PAGE.format(dark=ground, style=style, script=script.replace("export default { render };", "")))
