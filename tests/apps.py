"""A browser that looks at apps which listen on this machine."""

import contextlib
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def chromium():
  """The system's Chromium, headless; the test is skipped where there is none."""
  if CHROMIUM is None:
    pytest.skip("needs Chromium: apt-get install chromium")
  from playwright import sync_api

  with sync_api.sync_playwright() as play:
    browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield browser
    browser.close()


def until(page, happens, seconds=60):
  """Waits for what a page shows; our pages let nobody evaluate code in them."""
  for _ in range(seconds * 20):
    if happens():
      return
    page.wait_for_timeout(50)
  raise AssertionError(f"after {seconds} s: {page.inner_text('body')[:2000]}")


def serious(page):
  """What axe-core finds on a page that keeps people out, as (rule, an element)."""
  from axe_playwright_python.sync_playwright import Axe

  found = Axe().run(page).response["violations"]
  return [
    (v["id"], v["nodes"][0]["html"][:200])
    for v in found
    if v["impact"] in ("serious", "critical")
  ]
