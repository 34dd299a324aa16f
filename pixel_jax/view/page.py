"""A page and its clothes: style sheets and scripts of assets/.  No framework, nothing
fetched from elsewhere."""

import json
import pathlib
from collections.abc import Mapping

from pixel_jax.view import charts
from pixel_jax.view.text import escape


def asset(name: str) -> str:
  """The text of a style sheet or a script."""
  folder = pathlib.Path(__file__).with_name("assets")
  return (folder / name).read_text(encoding="utf-8")


def script(*names: str) -> str:
  """Scripts of assets/ as one, whose names are its own."""
  parts = "\n".join(map(asset, names))
  return f'(() => {{\n"use strict";\n{parts}}})();\n'


STYLE = asset("trajectory.css") + charts.STYLE + asset("page.css")
SCRIPT = script("common.js", "charts.js", "report.js")


def document(
  title: str,
  body: str,
  *,
  pictures: Mapping[str, str] | None = None,
  style: str = "",
  script: str = SCRIPT,
) -> str:
  """A whole page, of what `<body>` holds.

  Args:
    pictures: key -> data URI, of the <img data-picture=key> that `script` fills in.
    style: beside `STYLE`.
    script: inline; "" where the body names one to load.
  """
  stored = ""
  if pictures is not None:
    uris = json.dumps(pictures, separators=(",", ":"))
    stored = f'<script type="application/json" id="pictures">{uris}</script>\n'
  inline = f"<script>{script}</script>\n" if script else ""
  html = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}{style}</style>
</head>
<body>
{body}{stored}{inline}</body>
</html>
"""
  return html.encode(
    "utf-8", "replace"
  ).decode()  # what a model wrote may be half a pair


# Of a page that a server of ours sends: no script runs but the server's own.
HEADERS = {
  "Content-Security-Policy": (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src 'self' "
    "data: blob:; media-src blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
  ),
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cache-Control": "no-store",
}
