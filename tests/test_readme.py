"""README.md: its tables are those of the results, and what is cited exists."""

import json
import pathlib
import re
import tomllib

from pixel_jax.tools import readme

ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS = ("pixel_jax", "tools", "configs", "tests", "docs", "launch")


def test_the_tables_are_written_from_the_results():
  assert readme.written() == (ROOT / "README.md").read_text()


def test_what_the_readme_claims_holds_for_every_seed():
  """With curiosity RaPR >= .9, without <= .05; 20 points over SFT and over forbidden."""
  files = sorted(readme.RESULTS.glob("seed_*.json"))
  assert len(files) == 4
  for file in files:
    rows = {r["name"]: r["modes"] for r in json.loads(file.read_text())["rows"]}
    rl = rows["RL curiosity"]
    assert rl["free"]["rapr"] >= 0.9 and rows["RL alpha = 0"]["free"]["rapr"] <= 0.05
    for lower in (rl["forbidden"], rows["SFT"]["free"]):
      assert rl["free"]["accuracy"] >= lower["accuracy"] + 0.2


def test_every_room_has_a_floor():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())
  layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
  placed = {name for layer in layers for name in layer.split(" | ")}
  package = ROOT / "pixel_jax"
  rooms = {f"pixel_jax.{p.stem}" for p in package.glob("*.py")}
  rooms |= {f"pixel_jax.{p.parent.name}" for p in package.glob("*/__init__.py")}
  rooms |= {f"pixel_jax.run.{p.stem}" for p in (package / "run").glob("*.py")}
  rooms -= {"pixel_jax.__init__", "pixel_jax.run", "pixel_jax.run.__init__"}
  assert rooms == placed


OUTPUTS = {"trap.md", "notes.md", "table.md", "growth.md"}  # of runs


def test_documents_that_are_cited_exist():
  pages = {p.name for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]}
  pages.add("index.md")  # of the site: the README
  for folder in OURS:
    for file in (ROOT / folder).rglob("*"):
      if file.suffix not in (".py", ".md", ".sh") or "reference" in file.parts:
        continue
      text = file.read_text(encoding="utf-8")
      cited = set(re.findall(r"\b([a-z0-9_]+\.md)\b", text)) - OUTPUTS
      assert cited <= pages, f"{file}: {cited - pages}"
      if file.suffix == ".md":
        for link in re.findall(r"\]\(([^)#]+)\)", text):
          if not link.startswith("http"):
            assert (file.parent / link).exists(), f"{file}: {link}"
