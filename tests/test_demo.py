"""The demo: its events, and its page in a browser, from a dropped file to the answer."""

import base64
import concurrent.futures
import dataclasses
import functools
import io
import json
import pathlib
import time

import apps
import av
import httpx
import numpy as np
import pytest
from PIL import Image
from test_train import play

import pixel_jax
from pixel_jax import demo, hosting, parallel, server, trajectory
from pixel_jax.chat import completions, tools
from pixel_jax.data import world
from pixel_jax.rollout import session

QUESTION = world.QUESTIONS["image"]


@pytest.fixture(scope="module")
def opened():
  """The tiny base, twice: as it is compared with itself."""
  words = (
    "--checkpoint=tiny_base --slots=8 --max_prompt=768 --max_tokens=512 --queue=16"
  )
  args = demo.parse_args([*words.split(), "--max_new_tokens=400", "--max_turns=3"])
  with pytest.MonkeyPatch.context() as patch:
    one = parallel.make_mesh(1, 1, 1)
    patch.setattr(parallel, "make_mesh", lambda: one)
    opened = demo.open_demo(args)
  (policy,) = opened.policies
  hosting.warm(policy.services, policy.codec)
  yield opened
  for service in policy.services:
    service.close()


@pytest.fixture(scope="module")
def address(opened):
  with hosting.listening(opened.app) as address:
    yield address


def picture(index, kind="PNG"):
  buffer = io.BytesIO()
  world.draw(world.scene(0, "test", index)).save(buffer, kind)
  return buffer.getvalue()


def clip():
  """A clip of the tiny world as a file."""
  frames = world.draw(world.scene(0, "test", 7)).frames
  buffer = io.BytesIO()
  with av.open(buffer, "w", format="mp4") as container:
    stream = container.add_stream("libx264", rate=4, options={"crf": "1"})
    stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
    for frame in frames:
      packets = stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame)))
      container.mux(packets)
    container.mux(stream.encode())
  return buffer.getvalue()


def body(data, text=QUESTION, kind="image", **more):
  url = f"data:{kind}/any;base64,{base64.b64encode(data).decode()}"
  shown = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
  content = [shown, {"type": "text", "text": text}]
  return {"messages": [{"role": "user", "content": content}], "temperature": 0} | more


def ask(address, given):
  """The events of a question."""
  reply = httpx.post(address + "/ask", json=given, timeout=120)
  if reply.status_code != 200:
    return reply.status_code, reply.json()["error"]["message"]
  return [json.loads(x.removeprefix("data: ")) for x in reply.text.split("\n\n") if x]


def kept(opened, event):
  return opened._kept[event["link"].rpartition("/")[2]][1]


# ---- Events --------------------------------------------------------------------------


def test_text_comes_first_then_the_look_then_the_answer(opened, address):
  events = ask(address, body(picture(1)))
  kinds = [e["kind"] for e in events]
  assert kinds[0] == "text" and kinds.count("turns") == 1 and kinds[-1] == "end"
  looked, end = events[kinds.index("turns")], events[-1]
  said = "".join(e["text"] for e in events[: kinds.index("turns")] if "text" in e)
  assert said.startswith("<tool_call>") and said.endswith("</tool_call>")
  assert 'class="call"' in looked["html"] and "<rect" in looked["html"]
  assert len(looked["pictures"]) == 3  # the picture, its view, the crop
  assert not end["pictures"]  # the page has them all
  assert end["answer"] == "O" and end["looks"] == 1 and end["errors"] == 0
  assert end["tokens"] == sum(kept(opened, end).sampled)
  page = httpx.get(address + end["link"]).text
  assert "crop_image_normalized" in page and "data:image/" in page
  assert httpx.get(address + "/trajectory/none").status_code == 404


@pytest.mark.slow
def test_every_door_gives_the_same_answer_token_for_token(opened, address, tmp_path):
  """Demo, evaluation, server and library: greedy, the same questions."""
  play(
    ("evaluate", "configs/evaluate.py:tiny"), tmp_path,
    policies="BASE=tiny_base", modes=("free",),
    **{"data.tasks": 8, "rollout.temperature": 0.0},
  )  # fmt: skip
  (file,) = (tmp_path / "trajectories").glob("*.jsonl")
  evaluated = {t.task.media[0].path: t for t in trajectory.read_jsonl(file)}
  (policy,) = opened.policies
  served = server.Server(
    policy.services, policy.codec, name="m",
    limits=server.Limits(max_turns=3, max_new_tokens=400),
  )  # fmt: skip
  model = pixel_jax.load("tiny_base")
  with hosting.listening(served.app) as other:
    for name in set(demo.EXAMPLES) & set(evaluated):
      task = demo._task(name)
      scene = world.load_media(task.media[0])
      told = model.ask(task.question, scene, max_turns=3, max_new_tokens=400)
      text = {"role": "user", "content": task.question}
      end = ask(address, {"example": name, "messages": [text], "temperature": 0})[-1]
      ids = kept(opened, end).ids
      assert ids == told.trajectory.ids == evaluated[name].ids
      t = told.trajectory
      logp, entropy = model.score(t, lambda media, scene=scene: scene)
      assert logp == pytest.approx(t.logp, abs=1e-4)
      assert all((e > 0) <= s for e, s in zip(entropy, t.sampled)) and max(entropy) > 0
      assert end["answer"] == told.answer == task.answer  # the examples work
      if isinstance(scene, Image.Image):
        buffer = io.BytesIO()
        scene.save(buffer, "PNG")
        given = body(buffer.getvalue(), task.question)
        reply = httpx.post(
          other + "/v1/chat/completions", json=given, timeout=60
        ).json()
        said = reply["choices"][0]["message"]
        turns = kept(opened, end).turns
        assert said["content"] == task.answer
        assert said["reasoning_content"] == completions.reasoning(turns)


def test_without_looking_it_cannot_begin_a_call(opened, address):
  end = ask(address, body(picture(1), look=False))[-1]
  looked = kept(opened, ask(address, body(picture(1)))[-1])
  t = kept(opened, end)
  first = t.sampled.index(True)
  assert t.ids[:first] == looked.ids[:first]  # as evaluation's "forbidden" asks
  assert not t.calls and "<tool_call>" not in t.turns[-1]["text"]


def test_mistakes_are_told(address, monkeypatch):
  wrong = {
    "no question": body(picture(1), text=" "),
    "cannot be decoded": body(b"no picture"),
    "no video file|cannot be decoded": body(b"no clip", kind="video"),
    "no example": {"example": "world:0/train/1", "messages": [
      {"role": "user", "content": "?"}]},
    "no question of this page": {"policy": 7},
    "not fetched": {"messages": [{"role": "user", "content": [
      {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}]}]},
  }  # fmt: skip
  for told, given in wrong.items():
    status, message = ask(address, given)
    assert status == 400 and any(x in message for x in told.split("|")), message
  assert httpx.post(address + "/ask", content="{}").status_code == 415
  elsewhere = httpx.get(address, headers={"Host": "evil.example"})
  assert elsewhere.status_code == 400
  monkeypatch.setattr(demo, "MOST_SECONDS", 1)
  assert "minutes; allowed" in ask(address, body(clip(), kind="video"))[1]
  huge = io.BytesIO()
  Image.new("1", (12_000, 12_000)).save(huge, "PNG")  # 18 kB of 144 MPixel
  assert "allowed are" in ask(address, body(huge.getvalue()))[1]
  many = [{"type": "text", "text": "so much " * 900}]
  (error,) = ask(address, {"messages": [{"role": "user", "content": many}]})
  assert error["kind"] == "error" and "--max_prompt" in error["text"]


def test_links_hold_until_newer_ones_need_the_room(opened, address, monkeypatch):
  monkeypatch.setattr(demo, "KEPT", 2 * 3 * 252 * 252)
  links = [ask(address, body(picture(1)))[-1]["link"] for _ in range(4)]
  codes = [httpx.get(address + link).status_code for link in links]
  assert codes == [404, 404, 200, 200]


# ---- In a browser --------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
  with apps.chromium() as browser:
    yield browser


@pytest.fixture
def page(browser, address):
  context = browser.new_context()
  page = context.new_page()
  errors, outside = [], []
  page.on("pageerror", lambda e: errors.append(str(e)))
  page.on("dialog", lambda d: (errors.append(d.message), d.dismiss()))
  page.on("request", lambda r: outside.append(r.url))
  page.goto(address)
  yield page
  allowed = (address, "data:", "blob:")
  assert not errors and all(url.startswith(allowed) for url in outside)
  context.close()


def drop(page, *files):
  page.set_input_files("#files", [
    {"name": name, "mimeType": mime, "buffer": data} for name, mime, data in files
  ])  # fmt: skip


ONE = ("a.png", "image/png", picture(1))


def done(card):
  card.get_by_text("open the trajectory").wait_for()


def test_a_picture_from_the_file_to_the_answer_and_back_without_looking(page):
  drop(page, ONE)
  page.fill("#question", QUESTION)
  page.keyboard.press("Enter")
  card = page.locator(".card").first
  done(card)
  assert card.locator(".said strong").inner_text() == "O"
  assert card.locator(".canvas rect.call").count() == 1
  assert card.locator(".picture.returned img").evaluate("i => i.naturalWidth") == 56
  card.get_by_text("the same without looking").click()
  other = page.locator(".card").nth(1)
  done(other)
  assert other.locator("rect").count() == 0
  boxes = [page.locator(".card").nth(i).bounding_box() for i in (0, 1)]
  assert boxes[0]["y"] == boxes[1]["y"]  # side by side
  page.fill("#question", "And which one is blue?")  # again about the same picture
  page.click("#go")
  done(page.locator(".card").first)
  assert page.locator(".asked").count() == 2 and page.locator("#shown img").count() == 1
  assert apps.serious(page) == []
  with page.context.expect_page() as opened:
    page.get_by_text("open the trajectory").first.click()
  whole = opened.value
  whole.wait_for_load_state()
  assert (
    whole.locator(".picture.source img").first.evaluate("i => i.naturalWidth") == 252
  )
  assert apps.serious(whole) == []


def test_a_clip_from_the_file_to_the_answer(page):
  drop(page, ("a.mp4", "video/mp4", clip()))
  page.fill("#question", world.QUESTIONS["video"])
  page.click("#go")
  card = page.locator(".card").first
  done(card)
  assert card.locator(".film").first.locator("img").count() == 8
  assert card.locator(".film .chosen").count() >= 1  # the frame that was selected


def test_stop_and_again(opened, page, monkeypatch):
  quick = session.Session.step

  def step(self):
    time.sleep(0.3)  # the tiny model is done before anyone could press a button
    quick(self)

  monkeypatch.setattr(session.Session, "step", step)
  drop(page, ONE)
  page.fill("#question", QUESTION)
  page.click("#go")
  page.locator(".card .live").wait_for()
  page.click("#stop")
  page.get_by_text("stopped").wait_for()
  (service,) = opened.policies[0].services
  deadline = time.monotonic() + 60
  while service.load and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not service.load  # its slot is free
  monkeypatch.undo()
  page.click("#go")
  card = page.locator(".card").first
  done(card)
  card.get_by_role("button", name="again").click()
  done(card)
  assert card.locator(".said strong").inner_text() == "O"


def test_two_visitors_at_once_and_an_example_by_one_click(browser, address):
  contexts = [browser.new_context() for _ in range(2)]
  pages = [context.new_page() for context in contexts]
  for i, page in enumerate(pages):
    page.goto(address)
    page.locator(".example").nth(i).click()
  for i, page in enumerate(pages):
    done(page.locator(".card"))
    truth = demo._task(demo.EXAMPLES[i]).answer
    assert page.locator(".said strong").inner_text() == truth
    assert page.get_by_text("✓ correct").count() == 1
  for context in contexts:
    context.close()


def test_what_is_refused_is_told_on_the_page(page):
  drop(page, ("a.txt", "text/plain", b"words"))
  assert "neither a picture nor a clip" in page.inner_text("#told")
  page.evaluate("""() => {
    const t = new DataTransfer(), files = document.querySelector("#files");
    t.items.add(new File([new Uint8Array(46e6)], "a.png", { type: "image/png" }));
    files.files = t.files;
    files.dispatchEvent(new Event("change"));
  }""")
  assert "46 MB; 45 are allowed" in page.inner_text("#told")
  drop(page, *[("a.mp4", "video/mp4", b"x")] * 2)
  assert "One clip" in page.inner_text("#told")
  page.click("#go")
  assert "What do you want to know?" in page.inner_text("#told")
  drop(page, ("broken.png", "image/png", picture(1)[:200]))
  page.fill("#question", QUESTION)
  page.click("#go")
  page.get_by_text("cannot be decoded").wait_for()


def test_words_are_never_markup(page):
  evil = "<img src=x onerror=alert(1)><script>alert(2)</script>\u202e</textarea>"
  drop(page, ("<b>a</b>.png", "image/png", picture(1)))
  page.fill("#question", evil)
  page.click("#go")
  done(page.locator(".card").first)
  assert page.locator(".asked h2").inner_text().startswith("<img src=x")
  assert page.locator("#answers script, #answers [onerror], #shown b").count() == 0
  with page.context.expect_page() as opened:
    page.get_by_text("open the trajectory").click()
  opened.value.wait_for_load_state()
  assert "<img src=x" in opened.value.inner_text("h1")


def test_many_visitors_share_the_slots(address):
  with concurrent.futures.ThreadPoolExecutor(12) as pool:
    ends = list(pool.map(lambda i: ask(address, body(picture(1)))[-1], range(12)))
  assert [e["answer"] for e in ends] == ["O"] * 12


def test_nothing_is_written_to_disk(opened, address, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  ask(address, body(clip(), text=world.QUESTIONS["video"], kind="video"))
  assert not list(pathlib.Path(tmp_path).rglob("*"))


def test_two_policies_answer_side_by_side(opened, browser):
  (one,) = opened.policies
  both = [one, dataclasses.replace(one, name="other <i>one</i>")]
  compared = demo.Demo(both, **opened.limits, hosts=demo.LOOPBACK)
  with hosting.listening(compared.app) as address:
    page = browser.new_page()
    page.goto(address)
    page.locator(".example").first.click()
    for i in (0, 1):
      done(page.locator(".card").nth(i))
    heads = page.locator(".card h3").all_inner_texts()
    assert heads == ["tiny_base", "other <i>one</i>"]
    page.close()


def test_a_call_that_fails_is_shown_and_not_the_end(opened, page, monkeypatch):
  words = opened.policies[0].codec.tokenizer
  call = tools.call_text("crop_image_normalized", {"bbox_2d": [0.5], "target_image": 9})
  script = [[[*words.encode(call), words.im_end]]]
  make = functools.partial(dataclasses.replace, script=script)
  monkeypatch.setattr(demo, "Group", lambda **fields: make(session.Group(**fields)))
  drop(page, ONE)
  page.fill("#question", QUESTION)
  page.click("#go")
  card = page.locator(".card").first
  done(card)
  assert "1 failed" in card.locator(".said").inner_text()
  assert card.locator(".turn.failed").count() == 1
  assert "Execution error" in card.locator(".turn.failed").inner_text()
