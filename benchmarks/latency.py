"""How long a hand waits for the widget, by the page's own clock: `PYTHONPATH=tests python benchmarks/latency.py`.

JupyterLab with a real kernel and a headless Chromium. Of each notch of a slider: the time from the event until the
first change that is seen (what is shown is dimmed and the status says what is computed), and until all of the tab is of
the new mesh; then of six notches within a tenth of a second, until the last of them is shown.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lab

DATA = Path(__file__).resolve().parents[1] / "data"
PAPER = "ckptlab.explore(ckptlab.paper_model(ckptlab.Mesh({mesh}), 1, {model}))"
CASES = {
    "data/gpt_tp2_pp2_dp2 (52 tensors, 8 ranks)": 'ckptlab.explore(ckptlab.open("data/gpt_tp2_pp2_dp2"))',
    "Llama 2 7B, 194 tensors, 64 ranks": PAPER.format(
        mesh="tp=4, pp=2, dp=8", model="layers=32, hidden=4096, heads=32, vocab=32000"
    ),
    "GPT-3, 578 tensors, 512 ranks": PAPER.format(
        mesh="tp=8, pp=8, dp=8", model="layers=96, hidden=12288, heads=96, vocab=50257"
    ),
}
MEASURE = """async ([axis, degrees]) => {
    const root = document.querySelector(".ckptlab-explorer");
    const box = root.querySelector(`.panel:not([hidden]) .slider[data-axis="${axis}"]`);
    const input = box.querySelector("input");
    const options = [...box.querySelectorAll("[data-degree]")].map((tick) => Number(tick.dataset.degree));
    const move = (degree) => {
        input.value = options.indexOf(degree);
        input.dispatchEvent(new Event("input", { bubbles: true }));
    };
    const until = (done) => new Promise((answer) => {
        const look = () => (done() ? (watch.disconnect(), answer(performance.now())) : null);
        const watch = new MutationObserver(look);
        watch.observe(root, { subtree: true, childList: true, attributes: true, characterData: true });
        look();
    });
    const still = () => root.getAttribute("aria-busy") === "false";
    const shown = (degree) => still() && root.dataset.shown.includes(`${axis} ${degree}`);
    const last = degrees[degrees.length - 1];
    const start = performance.now();
    const change = until(() => root.getAttribute("aria-busy") === "true" || shown(last));
    for (const degree of degrees) {
        move(degree);
        if (degrees.length > 1) await new Promise((next) => setTimeout(next, 16));
    }
    const final = until(() => shown(last));
    return [(await change) - start, (await final) - start];
}"""


def main() -> None:
    print("| case | first change | all of the new mesh | six quick notches |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        notebooks, private = Path(folder, "notebooks"), Path(folder, "private")
        notebooks.mkdir()
        private.mkdir()
        (notebooks / "data").symlink_to(DATA)
        for i, code in enumerate(CASES.values()):
            lab.write_notebook(notebooks / f"case{i}.ipynb", f"import ckptlab\n{code}")
        with lab.server(notebooks, private) as address, lab.browser(private) as page:
            page.set_default_timeout(300_000)
            for i, case in enumerate(CASES):
                print(f"| {case} | {' | '.join(f'{ms:,.0f} ms' for ms in measured(page, address, i))} |", flush=True)


def measured(page: Any, address: str, case: int) -> list[float]:
    """Medians of first change and end of three notches of dp; the end of six quick ones."""
    lab.run_notebook(page, address, f"case{case}.ipynb")
    lab.shown(page, ".ckptlab-explorer figure svg")
    page.get_by_role("tab", name="Reshape").click()
    page.locator('figure[data-slot="to.plan"] svg').wait_for()
    page.wait_for_timeout(3_000)
    single = []
    for degree in (3, 4, 6):
        single.append(page.evaluate(MEASURE, ["dp", [degree]]))
        page.wait_for_timeout(1_500)
    quick = page.evaluate(MEASURE, ["dp", [8, 10, 12, 16, 12, 10]])
    return [sorted(change for change, _ in single)[1], sorted(end for _, end in single)[1], quick[1]]


if __name__ == "__main__":
    main()
