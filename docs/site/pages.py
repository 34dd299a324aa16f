"""What mkdocs is told besides its config: the README is the first page of the site."""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[2]


def on_files(files, config):
  """With the README, whose links begin in docs/ here instead of above it."""
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  text = text.replace("](docs/", "](")
  files.append(File.generated(config, "index.md", content=_without_outside(text)))
  return files


def on_page_markdown(markdown, page, config, files):
  return _without_outside(markdown)


def _without_outside(text: str) -> str:
  """Links to the README lead to its page; those to files that are no pages become names."""
  text = text.replace("](../README.md", "](index.md")
  return re.sub(r"\[([^\]]+)\]\((?:\.\./[^)]*|[A-Z]+\.md)\)", r"\1", text)
