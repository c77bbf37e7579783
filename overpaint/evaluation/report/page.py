"""The frame of the report page: no script, no font and no image from elsewhere."""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

TOOLS = """<div id="tools" role="region" aria-label="What is shown" hidden>
<form id="filter" autocomplete="off">
<details>
<summary>Filter <span id="shown" role="status"></span></summary>
<fieldset><legend>Models</legend><div class="choices" data-of="model"></div></fieldset>
<fieldset><legend>Kinds of prompts</legend><div class="choices" data-of="kind"></div></fieldset>
<p class="words"><label for="words">Prompt contains</label> <input id="words" type="search">
<button type="reset">Show all</button></p>
</details>
</form>
<p class="scheme"><label for="scheme">Colours</label> <select id="scheme" autocomplete="off">
<option value="light dark">as the device</option><option value="light">light</option>
<option value="dark">dark</option></select></p>
</div>"""
"""Hidden until the script is there to obey it; it fills in what there is to choose from."""


class Section(NamedTuple):
    """One part of a report."""

    anchor: str
    """What links point to: letters, digits and dashes, unique on the page."""
    heading: str
    """Plain text."""
    html: str
    """The content; whatever of it comes from outside is escaped."""


def page(*, title: str, lead: str, date: str, sections: Sequence[Section]) -> str:
    """Frames the sections of a report as one HTML page.

    Args:
        title: Plain text.
        lead: Plain text, below the title.
        date: When the page was made, as HTML.
        sections: In the order in which they are shown.

    Raises:
        ValueError: Two sections share an anchor, or one has none that a link can name.
    """
    anchors = [section.anchor for section in sections]
    if len(set(anchors)) < len(anchors) or not all(re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", one) for one in anchors):
        raise ValueError(f"sections must have unique anchors of letters, digits and dashes, got {anchors}")
    here = files("overpaint.evaluation.report")
    style = here.joinpath("report.css").read_text(encoding="utf-8")
    script = here.joinpath("report.js").read_text(encoding="utf-8")
    # The browser is told to load nothing, and to run this script and no other.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = "".join(f'<li><a href="#{one.anchor}">{escape(one.heading)}</a></li>' for one in sections)
    body = "\n".join(
        f'<section id="{one.anchor}">\n<h2>{escape(one.heading)}</h2>\n{one.html}\n</section>' for one in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
<p class="note">{date}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
{TOOLS}
{body}
<footer class="note">One page, whole in itself: it loads nothing from elsewhere, and its one script only filters what
is on it and switches between light and dark.</footer>
</main>
<script>{script}</script>
</body>
</html>
"""
