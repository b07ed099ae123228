"""What a person sees of a checkpoint or of a plan: plain data, text or HTML, from headers alone.

facts.py gathers (`summary`, `plan`: what `--json` prints), fold.py makes one line of same-shaped layers, phrases.py
puts the facts into words, text.py and html.py set them; differences.py, runs.py, statistics.py and health.py set what
the analysis found.
"""

from ckptlab.catalog import Catalog
from ckptlab.checkpoint import Checkpoint
from ckptlab.describe.facts import plan, summary
from ckptlab.describe.text import plan_text, summary_text
from ckptlab.reshaping import Reshape
from ckptlab.shown import shows

__all__ = ["plan", "plan_html", "plan_text", "summary", "summary_html", "summary_text"]


def summary_html(catalog: Catalog) -> str:
    """A checkpoint as a page, with what pictures need, which text does not."""
    from ckptlab.describe import html

    return html.summary_html(catalog)


def plan_html(reshape: Reshape) -> str:
    """A plan as a page."""
    from ckptlab.describe import html

    return html.plan_html(reshape)


shows(Checkpoint, text=lambda ckpt: summary_text(ckpt.catalog), html=lambda ckpt: summary_html(ckpt.catalog))
shows(Reshape, text=plan_text, html=plan_html)
