"""Apps that listen on this machine, and a browser that looks at them."""

import contextlib
import shutil
import socket
import threading

import pytest
import uvicorn


@contextlib.contextmanager
def listening(app):
  """The address of an app that is served in a thread."""
  listener = socket.create_server(("127.0.0.1", 0))
  config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
  one = uvicorn.Server(config)
  thread = threading.Thread(target=one.run, kwargs={"sockets": [listener]}, daemon=True)
  thread.start()
  yield f"http://127.0.0.1:{listener.getsockname()[1]}"
  one.should_exit = True
  thread.join(timeout=30)


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


def serious(page):
  """What axe-core finds on a page that keeps people out, as (rule, an element)."""
  from axe_playwright_python.sync_playwright import Axe

  found = Axe().run(page).response["violations"]
  return [
    (v["id"], v["nodes"][0]["html"][:200])
    for v in found
    if v["impact"] in ("serious", "critical")
  ]
