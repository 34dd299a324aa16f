"""Pictures of what people see: the demo, runs while they go on, the report, the data page.

  python -m pixel_jax.tools.screenshots --runs=DIR [--out=docs/pictures] [--only=demo,view]

DIR is what `./launch/local.sh` has filled.  Needs Chromium (`apt-get install chromium`) and
`pip install pixel_jax[demo] playwright`; nothing is fetched.
"""

import argparse
import contextlib
import io
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from PIL import Image

from pixel_jax import demo, hosting
from pixel_jax.data import media
from pixel_jax.evals import protocol
from pixel_jax.tools import view
from pixel_jax.view import live, runs
from pixel_jax.view.index import Index

DESK, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
PARTS = ("demo", "view", "report", "inspect", "docs")


class Camera:
  """A browser that takes pictures of pages, in `out`."""

  def __init__(self, browser, out: pathlib.Path):
    self._browser, self._out = browser, out

  @contextlib.contextmanager
  def page(self, address: str, size=DESK, scheme: str = "light") -> Iterator:
    context = self._browser.new_context(
      viewport=size, color_scheme=scheme, device_scale_factor=1.25,
      reduced_motion="reduce",
    )  # fmt: skip
    page = context.new_page()
    page.goto(address)
    yield page
    context.close()

  def take(self, page, name: str, *, whole: bool = False) -> None:
    page.wait_for_timeout(600)  # pictures are decoded
    path = self._out / f"{name}.webp"
    data = page.screenshot(full_page=whole)
    Image.open(io.BytesIO(data)).convert("RGB").save(path, quality=82, method=6)
    print(f"{path}  {path.stat().st_size / 1e3:.0f} kB", flush=True)


def of_demo(camera: Camera, root: pathlib.Path) -> None:
  """The demo: a picture with and without looking, a clip, two policies, a phone."""
  words = [f"--checkpoint={root / 'rl'}", f"--compare={root / 'sft'}"]
  words += ["--slots=4", "--max_prompt=768", "--max_tokens=256", "--max_new_tokens=64"]
  opened = demo.open_demo(demo.parse_args(words))
  for policy in opened.policies:
    hosting.warm(policy.services, policy.codec)
  alone = demo.Demo(opened.policies[:1], hosts=["*"], **opened.limits)

  def ask(page, example: int, cards: int) -> None:
    page.locator(".example").nth(example).click()
    for i in range(cards):
      page.locator(".card").nth(i).get_by_text("open the trajectory").wait_for()

  with hosting.listening(alone.app) as address:
    with camera.page(address) as page:
      ask(page, 0, 1)
      page.get_by_role("button", name="the same without looking").click()
      page.locator(".card").nth(1).get_by_text("open the trajectory").wait_for()
      page.evaluate("scrollTo(0, 0)")
      camera.take(page, "demo")
    with camera.page(address) as page:
      ask(page, 3, 1)
      page.evaluate("scrollTo(0, 0)")
      camera.take(page, "demo_video")
    with camera.page(address, PHONE) as page:
      ask(page, 1, 1)
      camera.take(page, "demo_phone", whole=True)
  with hosting.listening(opened.app) as address, camera.page(address) as page:
    ask(page, 2, 2)
    camera.take(page, "demo_compare")
  for policy in opened.policies:
    for service in policy.services:
      service.close()


def of_view(camera: Camera, root: pathlib.Path) -> None:
  """Runs while they go on: how far they are, two arms of RL, and their trajectories."""
  with tempfile.TemporaryDirectory() as folder:
    going = pathlib.Path(folder) / "runs"
    shutil.copytree(root, going, ignore=shutil.ignore_patterns("checkpoints", "*.html"))
    whole = (going / "rl" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (going / "rl" / "metrics.jsonl").write_text("".join(whole[: len(whole) // 2]))
    found = runs.open_runs(runs.find([going]))
    index = Index(judge=protocol.judge)
    index.update(runs.files(found))
    look = media.Library("").load
    app = live.Live(found, index, look, view.open_codec(found), hosts=["*"]).app
    with hosting.listening(app) as address:
      with camera.page(address) as page:
        page.locator("#list a").first.wait_for()
        camera.take(page, "runs_live")
      (going / "rl" / "metrics.jsonl").write_text("".join(whole))
      with camera.page(address) as page:
        page.locator("#list a").first.wait_for()
        page.get_by_role("button", name="helped").click()
        page.keyboard.press("p")
        page.wait_for_timeout(600)
        page.locator("#pane .group a.wrong").first.click()
        page.locator(".browser").evaluate("e => e.scrollIntoView()")
        camera.take(page, "runs_group")
      with camera.page(address, scheme="dark") as page:
        page.locator("#list a").first.wait_for()
        page.locator("#trajectories").evaluate("e => e.scrollIntoView()")
        camera.take(page, "runs_dark")
      with camera.page(address, PHONE) as page:
        page.locator("#list a").first.wait_for()
        page.locator("#trajectories").evaluate("e => e.scrollIntoView()")
        camera.take(page, "runs_phone")


def of_report(camera: Camera, root: pathlib.Path) -> None:
  """The file: its table and curves, an image, a clip."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "report.html"
    command = [sys.executable, "-m", "pixel_jax.tools.view", str(root), f"--out={path}"]
    subprocess.run(command, check=True)
    with camera.page(path.as_uri()) as page:
      camera.take(page, "report")
      page.locator("#trajectories").evaluate("e => e.scrollIntoView()")
      camera.take(page, "report_image")
      page.fill(".filters input", "video")
      page.locator("#trajectories").evaluate("e => e.scrollIntoView()")
      camera.take(page, "report_video")


def of_inspect(camera: Camera, root: pathlib.Path) -> None:
  """The data before it is trained on."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "page.html"
    command = [sys.executable, "-m", "pixel_jax.tools.inspect_data", "world:train"]
    command += ["--records=200", "--tokens=128", "--patches=192", f"--out={path}"]
    command += [f"--init={root / 'sft'}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with camera.page(path.as_uri()) as page:
      camera.take(page, "inspect")


def of_docs(camera: Camera, root: pathlib.Path) -> None:
  """The site, if this runs in a clone: its first page and the notebook."""
  config = pathlib.Path(__file__).resolve().parents[1] / "docs" / "site" / "mkdocs.yml"
  if not config.is_file():
    return print("no docs here: this is not a clone")
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(config)]
    subprocess.run([*command, "-d", folder], check=True)
    for name in ("index", "quickstart"):
      with camera.page((pathlib.Path(folder) / f"{name}.html").as_uri()) as page:
        camera.take(page, f"docs_{name}")
  return None


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--runs", required=True, type=pathlib.Path)
  parser.add_argument("--out", default="docs/pictures", type=pathlib.Path)
  parser.add_argument("--only", default=",".join(PARTS), help="some of them")
  args = parser.parse_args(argv)
  chromium = shutil.which("chromium") or shutil.which("chromium-browser")
  if chromium is None:
    parser.error("Chromium is not installed: apt-get install chromium")
  from playwright import sync_api  # here: --help needs none

  args.out.mkdir(parents=True, exist_ok=True)
  parts = {"demo": of_demo, "view": of_view, "report": of_report}
  parts |= {"inspect": of_inspect, "docs": of_docs}
  with sync_api.sync_playwright() as play:
    browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    for name in args.only.split(","):
      parts[name](Camera(browser, args.out), args.runs.resolve())
    browser.close()


if __name__ == "__main__":
  main()
