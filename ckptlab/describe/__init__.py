"""What a person sees of a checkpoint or of a plan: plain data, text or HTML, from headers alone.

facts.py gathers (`summary`, `plan`: what `--json` prints), fold.py makes one line of same-shaped layers, words.py
writes numbers, phrases.py puts the facts into words, text.py and html.py set them; differences.py does it all for
`diff`.
"""

from ckptlab.describe.facts import plan, summary
from ckptlab.describe.html import plan_html, summary_html
from ckptlab.describe.text import plan_text, summary_text

__all__ = ["plan", "plan_html", "plan_text", "summary", "summary_html", "summary_text"]
