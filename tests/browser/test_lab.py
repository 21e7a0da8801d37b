"""The workbook in a real browser: ``make lab`` on a copy of the notebooks, opened in Chromium and run by its menus."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from importlib.util import find_spec

import nbformat
import pytest

from jqlib.config import NOTEBOOKS, ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
MINUTES = 60_000  # Playwright counts in milliseconds
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
SHOTS = ROOT / ".screenshots"
TOKEN = "workbook"
TALL = 15_000  # pixels: Chromium draws no window of more than 16,384

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium here (Debian: apt-get install chromium)"),
    pytest.mark.skipif(not find_spec("playwright"), reason="playwright is missing: pip install -e .[browser]"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the server works on: copies of the notebooks, and one that says where its kernel lives."""
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns(".*"))
    asks = nbformat.read(folder / NAMES[0], as_version=4)
    asks.cells = [nbformat.v4.new_code_cell("import sys\nprint(sys.prefix)")]
    nbformat.write(asks, folder / "kernel.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(folder):
    """The address of ``make lab``, with settings of its own: no news, and a user's kernel that must not be taken."""
    home = folder.parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "open_browser": False, "allow_root": True}
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    for path, content in {
        "config/jupyter_server_config.json": {"ServerApp": server, "IdentityProvider": {"token": TOKEN}},
        "config/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings": quiet,
        "data/kernels/python3/kernel.json": {"argv": ["false"], "display_name": "not this one", "language": "python"},
    }.items():
        (home / path).parent.mkdir(parents=True)
        (home / path).write_text(json.dumps(content))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "MAKE"))}
    environment |= {"JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data")}
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            ["make", "lab", f"NOTEBOOKS={folder}"], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            call(address, "GET", "/api")
            break
        except OSError:
            assert process.poll() is None, (home / "log").read_text()
            time.sleep(0.5)
    yield address
    call(address, "POST", "/api/shutdown")
    assert process.wait(60) == 0, (home / "log").read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    from playwright.sync_api import sync_playwright

    SHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"), executable_path=CHROMIUM, args=FLAGS,
            viewport={"width": 1400, "height": 1000},
        )  # fmt: skip
        yield browser.new_page()
        browser.close()


def call(address: str, method: str, path: str):
    request = urllib.request.Request(address + path, method=method, headers={"Authorization": f"token {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read() or "null")


def run_all(page, lab, path):
    """Open a notebook, run all its cells from the menu and wait for the end; returns its code cells as saved."""
    page.goto(f"{lab}/lab/tree/{path.name}?token={TOKEN}&reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=MINUTES)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=2 * MINUTES)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    for _ in range(15 * 30):
        page.wait_for_timeout(2000)
        page.keyboard.press("Control+s")
        try:
            code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        except nbformat.reader.NotJSONError:  # the server is in the middle of writing it
            continue
        if errors(code) or all(cell.execution_count for cell in code):
            return code
    raise TimeoutError(f"{path.name} still runs after 15 minutes")


def errors(code) -> list[str]:
    return ["\n".join(o.traceback) for cell in code for o in cell.outputs if o.output_type == "error"]


def saves_figure(cell) -> bool:
    return any(line.startswith("store.save_figure(") for line in cell.source.splitlines())


def pictures(cell) -> list:
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


def shoot(page, name):
    """The whole notebook in one screenshot or two: in a very tall window every cell is drawn."""
    size, panel = page.viewport_size, page.locator(".jp-WindowedPanel-outer")
    page.set_viewport_size(size | {"height": TALL})
    page.wait_for_timeout(1000)
    for part in range(-(-panel.evaluate("panel => panel.scrollHeight") // TALL)):
        panel.evaluate(f"panel => panel.scrollTo(0, {part * TALL})")
        page.wait_for_timeout(3000)
        page.screenshot(path=SHOTS / f"{name}{'_continued' * part}.png")
    cut = "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerHTML.slice(0, 200))"
    assert page.locator(".jp-OutputArea-output:has(img)").evaluate_all(cut) == []
    page.set_viewport_size(size)


def test_lab_opens_on_the_environments_kernel(page, lab, folder):
    (cell,) = run_all(page, lab, folder / "kernel.ipynb")
    assert cell.outputs[0].text.strip() == str(ROOT / ".venv")


@pytest.mark.parametrize("name", NAMES)
def test_notebook(page, lab, folder, name):
    code = run_all(page, lab, folder / name)
    try:
        shoot(page, name[:2])
        assert errors(code) == []
        assert [cell.source for cell in code if saves_figure(cell) and not pictures(cell)] == []
        if any("explorer(" in cell.source for cell in code):
            explore(page, name[:2])
    finally:
        for kernel in call(lab, "GET", "/api/kernels"):
            call(lab, "DELETE", f"/api/kernels/{kernel['id']}")


def explore(page, number):
    """Every control changes the figure, and moving one back brings the old figure back; no colour stays behind."""
    figure = page.locator(PLOT)
    figure.scroll_into_view_if_needed()
    bits, layer = (page.locator(".widget-hslider", has_text=text).locator(".noUi-handle") for text in ("bits", "layer"))
    left, right = (page.get_by_label(side, exact=True) for side in ("left", "right"))
    rotation, nothing = right.input_value(), left.input_value()
    first = state(figure)
    assert figure.locator(".legendtext").all_text_contents()[2:] == ["becomes 0", "keeps a value"]
    assert len({*dots(figure)}) == 2
    last = moved(page, first, "layer", lambda: layer.press("ArrowRight"))
    last = moved(page, last, "bits", lambda: bits.press("ArrowRight"))
    x, y = over_a_token(page, 100)
    last = moved(page, last, "token", lambda: page.mouse.click(x, y))
    assert page.locator(".widget-html mark").count() == 1
    last = moved(page, last, "site", lambda: page.get_by_role("button", name="ug", exact=True).click())
    before = last
    last = moved(page, last, "right", lambda: right.select_option(nothing))
    one, other = colours(figure)
    assert one == other
    assert moved(page, last, "right", lambda: right.select_option(rotation)) == before
    last = moved(page, before, "left", lambda: left.select_option(rotation))
    assert len({*colours(figure)}) == 1
    assert moved(page, last, "left", lambda: left.select_option(nothing)) == before
    page.screenshot(path=SHOTS / f"{number}_explorer.png")
    moved(page, before, "play", lambda: page.locator(".widget-play button").first.click())
    page.wait_for_function(f"() => document.querySelector('{PLOT}').layout.annotations[1].text.includes('of the way')")
    page.screenshot(path=SHOTS / f"{number}_explorer_on_the_way.png")
    end = f"before => ({STATE})(document.querySelector('{PLOT}')) === before"
    page.wait_for_function(end, arg=before, timeout=MINUTES)  # the film ends where it was


def over_a_token(page, number) -> tuple[float, float]:
    """Puts the mouse where its mark stands in the upper panel; a layer that watches the mouse lies above it."""
    box = page.locator(f"{PLOT} .subplot.xy .scatterlayer .points path").nth(number).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.wait_for_timeout(500)
    return x, y


PLOT = ".js-plotly-plot"
STATE = "plot => JSON.stringify([plot.layout.annotations.map(a => a.text), plot.data.slice(0, 2).map(t => t.name)])"


def state(figure) -> str:
    return figure.evaluate(STATE)


def colours(figure) -> list[str]:
    """Of both sides' errors, as they are drawn."""
    marks = "plot => [0, 1].map(i => plot.querySelectorAll('.subplot.xy .scatterlayer .trace')[i]"
    return figure.evaluate(f"{marks}.querySelector('.points path').style.fill)")


def dots(figure) -> list[str]:
    """Colours of what becomes 0 and what does not, on both sides."""
    fills = "all => all.map(trace => trace.querySelector('.points path')?.style.fill).filter(Boolean)"
    return figure.locator(".subplot.x2y2 .trace, .subplot.x3y3 .trace").evaluate_all(fills)


def moved(page, last: str, what: str, move) -> str:
    """Make a move and wait until the figure is another; returns its state, and prints how long that took."""
    start = time.perf_counter()
    move()
    changed = f"last => ({STATE})(document.querySelector('{PLOT}')) !== last"
    page.wait_for_function(changed, arg=last, timeout=MINUTES / 6)
    print(f"{what}: {time.perf_counter() - start:.2f} s")
    return state(page.locator(PLOT))
