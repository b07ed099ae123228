"""The widget in a real browser: in JupyterLab and marimo, sliders dragged fast; a page of it from disk, no kernel."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lab
import pytest
from compare import DATA, GPT

import ckptlab
from ckptlab import Mesh

HANGS = 900  # seconds after which a page that waits for nothing is closed: no bound on how long a machine may take

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(lab.missing()), reason=f"no {lab.missing()} here"),
]

# Looks at the widget after every change of it: what is shown beside each other is of one mesh.
WATCH = """root => {
    window.seen = { wrong: [], busy: 0, settled: 0, costs: 0 };
    const look = () => {
        const text = (one) => one?.textContent ?? "";
        const panel = root.querySelector('.panel:not([hidden])');
        const said = new Set([...panel.querySelectorAll("figure[data-of]")].map((f) => f.dataset.of));
        if (!said.size) return;
        const [mesh] = said;
        if (said.size > 1) window.seen.wrong.push(["figures", ...said]);
        const title = text(root.querySelector(".title"));
        const slots = ["look", "to", "model"].map((one) => `[data-slot="${one}.mesh"] svg text.title`);
        const head = text(panel.querySelector(slots.join()));
        const named = (said) => mesh.split(" · ").every((axis) => said.includes(axis));
        if (!named(title)) window.seen.wrong.push(["title", title, mesh]);
        if (head && !named(head)) window.seen.wrong.push(["picture", head, mesh]);
        const moves = text(panel.querySelector('[data-slot="to.plan"] text.title'));
        const plan = /→ ([\\d,]+) ranks?: (.+) read, (.+) change rank/.exec(moves);
        if (plan) {
            const ranks = mesh.split(" · ").reduce((product, axis) => product * Number(axis.split(" ")[1]), 1);
            const [read, , moved] = [...panel.querySelectorAll('[data-slot="to.figures"] b')].map(text);
            const flow = text(panel.querySelector('[data-slot="to.flow"] text.title'));
            window.seen.costs += 1;
            if (Number(plan[1].replace(",", "")) !== ranks) window.seen.wrong.push(["plan", plan[0], mesh]);
            if (read !== plan[2] || moved !== plan[3]) window.seen.wrong.push(["cost", read, moved, plan[0], mesh]);
            if (flow !== plan.input) window.seen.wrong.push(["flow", flow, plan.input]);
        }
        if (root.getAttribute("aria-busy") === "true") {
            window.seen.busy += 1;
            if (!text(root.querySelector(".status"))) window.seen.wrong.push(["says nothing while it works"]);
            return;
        }
        window.seen.settled += 1;
        const hands = [...panel.querySelectorAll(".slider:not([data-axis=ZeRO])")];
        const slid = hands.map((s) => `${s.dataset.axis} ${text(s.querySelector("output"))}`).join(" · ");
        const refused = panel.querySelector(".refused[role=alert]");
        const line = text(root.querySelector("pre.line"));
        if (refused) {
            if (!line.startsWith("#")) window.seen.wrong.push(["refused", slid, mesh, line]);
            return;
        }
        if (slid && slid !== mesh) window.seen.wrong.push(["sliders", slid, mesh]);
        const code = mesh.split(" · ").filter((p) => !p.endsWith(" 1")).map((p) => p.replace(" ", "=")).join(", ");
        const call = root.dataset.tab === "Model" ? "paper_model" : "reshape";
        if (slid && !line.includes(`${call}(ckptlab.Mesh(${code})`)) window.seen.wrong.push(["line", line, mesh]);
    };
    new MutationObserver(look).observe(root, { subtree: true, childList: true, attributes: true, characterData: true });
}"""


@contextmanager
def time_out(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds, whatever is being waited for; everything opened inside is closed."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"the browser test took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def slide(root: Any, axis: str, degree: int) -> None:
    """Move a slider as a hand does, and wait for nothing."""
    root.evaluate(
        """(root, [axis, degree]) => {
            const box = root.querySelector(`.panel:not([hidden]) .slider[data-axis="${axis}"]`);
            const options = [...box.querySelectorAll("[data-degree]")].map((tick) => Number(tick.dataset.degree));
            const input = box.querySelector("input");
            input.value = options.indexOf(degree);
            input.dispatchEvent(new Event("input", { bubbles: true }));
        }""",
        [axis, degree],
    )


def settled(page: Any, mesh: str) -> None:
    page.locator(f'.ckptlab-explorer[data-shown="{mesh}"][aria-busy="false"]').first.wait_for()


def test_no_state_of_the_widget_contradicts_itself_in_jupyterlab(tmp_path: Path) -> None:
    notebooks, private = tmp_path / "notebooks", tmp_path / "private"
    notebooks.mkdir()
    private.mkdir()
    (notebooks / "data").symlink_to(DATA)
    opened = f'import ckptlab\nshown = ckptlab.explore(ckptlab.open("data/{GPT.name}"))\nshown'
    lab.write_notebook(notebooks / "widget.ipynb", opened)
    with time_out(HANGS), lab.server(notebooks, private) as address, lab.browser(private) as page:
        page.set_default_timeout(HANGS * 1000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        lab.run_notebook(page, address, "widget.ipynb")
        lab.shown(page, ".ckptlab-explorer")
        root = page.locator(".ckptlab-explorer")
        settled(page, "tp 2 · pp 2 · dp 2")

        # hover: the file and the bytes; click: all that the rank holds
        root.locator('figure[data-slot="look.mesh"] [data-rank="2"]').hover()
        root.locator(".tip").get_by_text("rank 2: tp 0 · pp 0 · dp 1").first.wait_for()
        root.locator('figure[data-slot="look.mesh"] [data-rank="5"]').click()
        root.get_by_text("rank 5: tp 1 · pp 1 · dp 0 holds").wait_for()
        root.get_by_text("rank 5 (tp 1 · pp 1 · dp 0) holds nothing of it").wait_for()

        # sliders, faster than they are answered, over degrees that cannot be
        root.get_by_role("tab", name="Reshape").click()
        root.get_by_role("button", name="Python").click()
        root.locator('figure[data-slot="to.plan"] svg').wait_for()
        root.evaluate(WATCH)
        for degree in (3, 4, 6, 2, 1):
            for dp in (2, 3, 8):
                slide(root, "dp", dp)
            slide(root, "tp", degree)
        settled(page, "tp 1 · pp 2 · dp 8")
        slide(root, "tp", 3)
        root.get_by_text("4 attention heads are not divisible by it").first.wait_for()
        root.locator('.panel:not([hidden]) .degrees [data-axis="tp"][data-degree="4"]').click()
        settled(page, "tp 4 · pp 2 · dp 8")
        seen = page.evaluate("window.seen")
        assert seen["wrong"] == []
        assert seen["busy"] > 5
        assert seen["settled"] > 2
        assert seen["costs"] > 5

        # the tree: search, choose; step by step
        root.get_by_placeholder("search tensors").fill("5 4h_to_h weight")
        root.locator('.leaf[data-name="5.mlp.dense_4h_to_h.weight"]').click()
        root.get_by_role("tab", name="Step by step").click()
        root.get_by_text("ZeRO lays the tensors of a group").wait_for()
        root.get_by_role("button", name="the next step").click()
        root.get_by_text("Merge dp: the fragments").wait_for()
        assert "5.mlp.dense_4h_to_h.weight" in root.locator('figure[data-slot="step.pictures"]').inner_html()

        # values: the element under the mouse, and a part of them that a drag marks
        root.get_by_role("tab", name="Values").click()
        told = element_under_the_mouse(page, root, 0.4, 0.6)
        index = tuple(int(n) for n in re.findall(r"(?:out|in) (\d+)", told))
        whole = ckptlab.open(GPT).full("master", stack=False)["5.mlp.dense_4h_to_h.weight"].values
        assert float(told.split(" = ")[1].split()[0]) == pytest.approx(float(whole[index]), rel=1e-6)
        assert re.search(
            r"rank \d: tp \d · pp 1 · dp \d · bf16_zero_pp_rank_\d_mp_rank_\d\d_optim_states.pt, bytes", told
        )
        box = root.locator("svg .heat").bounding_box()
        page.mouse.move(box["x"] + 2, box["y"] + 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.up()
        root.locator('.window input[aria-label="out up to"]:not([value="16"])').wait_for()
        root.get_by_role("button", name="whole").last.click()
        root.locator('.window input[aria-label="out up to"][value="16"]').wait_for()
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def element_under_the_mouse(page: Any, root: Any, across: float, down: float) -> str:
    """What the heat map says of the element at a share of its width and height."""
    root.locator("svg .heat").wait_for()
    box = root.locator("svg .heat").bounding_box()
    page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
    root.locator(".tip").get_by_text("bytes").wait_for()
    return root.locator(".tip").inner_text()


MARIMO = """
import marimo

app = marimo.App(width="full")


@app.cell
def _():
    import ckptlab

    shown = ckptlab.explore(ckptlab.open({path!r}))
    shown
    return


if __name__ == "__main__":
    app.run()
"""


def test_no_state_of_the_widget_contradicts_itself_in_marimo(tmp_path: Path) -> None:
    pytest.importorskip("marimo")
    (tmp_path / "page.py").write_text(MARIMO.format(path=str(GPT)))
    with time_out(HANGS), lab.marimo(tmp_path / "page.py") as address, lab.browser(tmp_path / "private") as page:
        page.set_default_timeout(HANGS * 1000)
        page.goto(address)
        root = page.locator(".ckptlab-explorer")
        settled(page, "tp 2 · pp 2 · dp 2")
        root.get_by_role("tab", name="Reshape").click()
        root.locator('figure[data-slot="to.plan"] svg').wait_for()
        root.evaluate(WATCH)
        for degree in (3, 4, 1):
            for dp in (2, 6):
                slide(root, "dp", dp)
            slide(root, "tp", degree)
        settled(page, "tp 1 · pp 2 · dp 6")
        seen = page.evaluate("window.seen")
        assert seen["wrong"] == []
        assert seen["settled"] > 0


def _model(name: str, mesh: Mesh) -> Any:
    """The playground with the numbers of a model of today."""
    found = ckptlab.playground(Mesh(tp=4))
    found.model = found.presets[name]["model"]
    found.source_mesh = mesh
    return found


OTHERS = {
    "experts": lambda: ckptlab.explore(ckptlab.open(DATA / "moe_ep2_dp4")),
    "FSDP2": lambda: ckptlab.explore(ckptlab.open(DATA / "fsdp2_tp2_dp2/step-3")),
    "AutoTP": lambda: ckptlab.explore(ckptlab.open(DATA / "autotp_tp2_dp2")),
    "Llama 3": lambda: _model("Llama 3 8B", Mesh(tp=4, pp=2, dp=4)),
    "DeepSeek-V3": lambda: _model("DeepSeek-V3", Mesh(tp=4, pp=4, dp=4)),
}


def test_no_hand_brings_the_widget_to_contradict_itself(tmp_path: Path) -> None:
    """Tabs, sliders, tensors and ranks in any order and faster than they are answered, of several checkpoints."""
    with time_out(HANGS), lab.browser(tmp_path) as page:
        page.set_default_timeout(HANGS * 1000)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        for name, make in OTHERS.items():
            chance = random.Random(name)
            lab.put_widget(page, make())
            root = page.locator(".ckptlab-explorer")
            root.locator("xpath=self::*[@aria-busy='false']").wait_for()
            root.get_by_role("button", name="Python").click()
            if name == "Llama 3":  # its numbers and its activations change at once
                root.get_by_label("start from a model").select_option("Mixtral 8x7B")
                root.get_by_text("(46.7 billion) parameters").wait_for()
                assert "32 layers of 4,096" in root.locator("h3.title").inner_text()
                assert root.locator('[data-kept="active"]').input_value() == "2"
                assert "1 × 4,096 tokens" in root.locator('[data-slot="model.zero"]').inner_text()
            root.evaluate(WATCH)
            tabs = root.get_by_role("tab").evaluate_all("tabs => tabs.map((tab) => tab.dataset.tab)")
            for _ in range(6):
                if chance.random() < 0.2:
                    root.locator(f'[role=tab][data-tab="{chance.choice(tabs)}"]').click()
                elif ticks := root.locator(".panel:not([hidden]) .slider").evaluate_all(TICKS):
                    axis, degrees = chance.choice(ticks)
                    for degree in chance.sample(degrees[:9], min(3, len(degrees))):
                        slide(root, axis, degree)
                kind = chance.choice([".leaf", ".panel:not([hidden]) figure:not([hidden]) svg [data-rank]"])
                root.evaluate(PRESS, [kind, chance.random()])
            settled_at_last(page)
            seen = page.evaluate("window.seen")
            assert seen["wrong"] == [], name
            assert seen["settled"] > 3, name
        assert errors == []


TICKS = """all => all.map((one) => [
    one.dataset.axis, [...one.querySelectorAll("[data-degree]")].map((tick) => Number(tick.dataset.degree)),
])"""
PRESS = """(root, [kind, at]) => {
    const all = [...root.querySelectorAll(kind)];
    all[Math.floor(at * all.length)]?.dispatchEvent(new MouseEvent("click", { bubbles: true }));
}"""


def settled_at_last(page: Any) -> None:
    """Nothing is being worked out, and nothing is about to be."""
    page.wait_for_timeout(300)
    page.locator('.ckptlab-explorer[aria-busy="false"]').wait_for()


def test_an_exported_page_answers_from_disk(tmp_path: Path) -> None:
    explorer = ckptlab.explore(ckptlab.open(GPT))
    explorer.choose(tensor="2.mlp.dense_h_to_4h.weight", rank=3)
    names = ["2.mlp.dense_h_to_4h.weight", "5.mlp.dense_4h_to_h.weight"]
    explorer.to_html(tmp_path / "page.html", meshes=[Mesh(tp=4, pp=2, dp=2), Mesh(tp=2, pp=1, dp=2)], tensors=names)
    with time_out(HANGS), lab.browser(tmp_path / "private") as page:
        page.set_default_timeout(HANGS * 1000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        root = page.locator(".ckptlab-explorer")
        settled(page, "tp 2 · pp 2 · dp 2")
        root.locator('figure[data-slot="look.mesh"] [data-rank="3"]').hover()
        root.locator(".tip").get_by_text("bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt, bytes").wait_for()
        root.get_by_role("tab", name="Values").click()
        told = element_under_the_mouse(page, root, 0.99, 0.99)
        assert told.startswith("[out 63, in 15] = ")
        assert (
            "rank 3: tp 1 · pp 0 · dp 1 · bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt, bytes 22,140–22,143" in told
        )
        root.get_by_role("tab", name="Look").click()
        root.locator('.panel:not([hidden]) [data-slot="look.mesh"] [data-rank="6"]').click()
        root.get_by_text("rank 6: tp 0 · pp 1 · dp 1 holds").wait_for()
        root.get_by_role("tab", name="Reshape").click()
        root.evaluate(WATCH)
        slide(root, "tp", 4)
        settled(page, "tp 4 · pp 2 · dp 2")
        slide(root, "tp", 8)
        root.get_by_text("not in this page").wait_for()
        root.locator('[data-axis="tp"] [data-degree="2"]').click()
        root.locator('.panel:not([hidden]) .slider[data-axis="tp"] input').focus()
        page.keyboard.press("ArrowRight")  # over tp 3, which is not there
        settled(page, "tp 4 · pp 2 · dp 2")
        page.keyboard.press("ArrowLeft")
        settled(page, "tp 2 · pp 2 · dp 2")
        slide(root, "pp", 1)
        settled(page, "tp 2 · pp 1 · dp 2")
        root.locator('.leaf[data-name="5.mlp.dense_4h_to_h.weight"]').or_(
            root.get_by_text("5", exact=True)
        ).first.click()
        assert page.evaluate("window.seen.wrong") == []
        root.locator('figure[data-slot="to.mesh"]').focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        root.get_by_text("rank 1: tp 1 · pp 0 · dp 0 holds").wait_for()
        assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
