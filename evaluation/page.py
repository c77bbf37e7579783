"""The frame of the report page: no script, no font and no image from elsewhere."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files


def page(*, title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Frames the sections of a report as one HTML page.

    Args:
        title: Plain text.
        lead: Plain text, below the title.
        sections: Anchor, heading (both plain text) and content (HTML) of each.
    """
    style = files("evaluation").joinpath("report.css").read_text(encoding="utf-8")
    links = "".join(f'<li><a href="#{escape(anchor)}">{escape(heading)}</a></li>' for anchor, heading, _ in sections)
    body = "\n".join(
        f'<section id="{escape(anchor)}">\n<h2>{escape(heading)}</h2>\n{content}\n</section>'
        for anchor, heading, content in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
{body}
<footer class="note">One page, whole in itself: nothing on it is loaded from elsewhere.</footer>
</main>
</body>
</html>
"""
