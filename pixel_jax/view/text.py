"""Text as HTML text: the one door through which foreign words reach the page."""

import html
from typing import Any

# What turns the reading direction of its surroundings, and NUL, which HTML cannot hold.
UNSEEN = {c: f"\\u{c:04x}" for c in (0, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def escape(text: Any) -> str:
  """Safe between tags and in quoted attributes; also without lone surrogates."""
  text = str(text).encode("utf-8", "replace").decode().translate(UNSEEN)
  return html.escape(text, quote=True)
