"""The documentation as a site, and its notebook."""

import json
import os
import pathlib
import subprocess
import sys

import apps
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_has_its_outputs_and_no_path_of_a_machine():
  silent = [cell for cell in CODE if not cell["outputs"]]
  assert [cell["source"][-1].split("(")[0] for cell in silent] == ["train_rl.main"]
  text = json.dumps(NOTEBOOK)
  assert '"error"' not in text and "/tmp/" not in text and "/home/" not in text


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
  """Cell after cell in a fresh Python, in an empty folder; what it says is what it said."""
  cells = ["".join(cell["source"]) for cell in CODE]
  said = "print(json.dumps([answer.answer, task.answer, step['reward/correct']]))"
  run = subprocess.run(
    [sys.executable, "-c", "\n".join([*cells, "import json", said])],
    cwd=tmp_path, capture_output=True, text=True, timeout=900,
  )  # fmt: skip
  assert not run.returncode, run.stderr[-2000:]
  got, right, correct = json.loads(run.stdout.splitlines()[-1])
  assert got == right and 0 <= correct <= 1
  told = "".join(CODE[-1]["outputs"][0]["data"]["text/plain"])
  assert str(correct)[:6] in told


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """Built as CI does: a link that leads nowhere fails."""
  pytest.importorskip("mkdocs", reason="needs pip install '.[docs]'")
  out = tmp_path_factory.mktemp("site")
  run = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict",
     "-f", str(ROOT / "docs" / "site" / "mkdocs.yml"), "-d", str(out)],
    capture_output=True, text=True, timeout=600, cwd=out,
    env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
  )  # fmt: skip
  assert not run.returncode, run.stderr[-3000:]
  return out


@pytest.mark.slow
def test_every_page_is_there_and_asks_nothing_of_others(site):
  names = ["index", "method", "quickstart", "gpu", "pods", "data", "evaluation",
           "looking", "pytorch", "extending", "performance", "design", "api"]  # fmt: skip
  with apps.chromium() as browser:
    page, asked = browser.new_page(), []
    page.on("request", lambda r: asked.append(r.url))
    for name in names:
      page.goto((site / f"{name}.html").as_uri())
      assert page.locator("h1").first.inner_text().strip()
      broken = page.evaluate(
        "() => [...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
      )
      assert not broken
    assert all(url.startswith(("file://", "data:", "blob:")) for url in asked), asked
    page.goto((site / "index.html").as_uri())
    assert page.locator("img[alt^='A trajectory']").count() == 1
    page.goto((site / "api.html").as_uri())
    text = page.inner_text("article")
    for said in ("ask(", "score(", "curiosity", "Trajectory", "normalizer"):
      assert said.lower() in text.lower(), said
    page.goto((site / "quickstart.html").as_uri())
    assert page.locator(".trajectory rect.call").count() >= 1


@pytest.mark.slow
def test_the_site_is_open_to_all(site):
  with apps.chromium() as browser:
    for scheme in ("light", "dark"):
      page = browser.new_page(color_scheme=scheme)
      for name in ("index", "method", "api", "looking"):
        page.goto((site / f"{name}.html").as_uri())
        page.wait_for_timeout(300)
        assert apps.serious(page) == [], (name, scheme)
