"""tools/inspect_data.py: counts against the files, and a page that holds no markup."""

import json
import re

import apps
import layouts
import pytest

from pixel_jax.tools import inspect_data


def run(capsys, *arguments):
  inspect_data.main([str(a) for a in arguments])
  return capsys.readouterr().out


def test_what_is_told_of_traces(tmp_path, capsys):
  uri = layouts.pixel_reasoner_sft(tmp_path, 40)
  text = run(capsys, uri, f"--root={tmp_path}", "--tokens=1024", "--patches=4096")
  assert "40 records, 40 of them read" in text
  for line in (
    "20 trace, image", "10 trace, video", "10 trace, text", "40 message_list", "40 qid",
    "10 crop_image_normalized, planted", "20 crop_image_normalized\n", "10 select_frames",
  ):  # fmt: skip
    assert re.search(rf"^ +{re.escape(line)}", text, re.M), line
  # A histogram holds everything once.
  bars = re.findall(
    r"^ +[\d,]+ \.\. +[\d,]+ +(\d+)", text.partition("pixels of")[0], re.M
  )
  assert sum(map(int, bars)) == 40
  shown = text.partition("as the model sees it\n")[2]
  assert shown.startswith("<|im_start|>system\nYou are a helpful assistant.")
  assert re.search(
    r"<\|vision_start\|><\|(image|video)_pad\|> x \d+<\|vision_end\|>", shown
  )
  use = re.search(r"T +1,024 P +4,096 +100\.0% +(\d+) +(\S+) +(\S+)", text)
  assert 0.5 < float(use[2]) <= 1 and 0 < float(use[3]) <= 1


def test_packing_is_counted_as_the_packer_fills(tmp_path):
  from pixel_jax.chat import encode, tokenizer
  from pixel_jax.data import pack, sources

  uri = layouts.ours(tmp_path, 9)
  codec = encode.Codec(tokenizer=tokenizer.make_tiny(tmp_path / "words"))
  source = sources.open_source(uri, root=tmp_path, codec=codec)
  examples = [s.example for s in inspect_data.look(source, codec, 9).seen]
  T, P = 2 * max(len(e.tokens) for e in examples), 1024
  fit, rows, tokens, patches = inspect_data.packing(examples, T, P)
  packed = pack.first_fit(examples, T, P)
  batch = pack.collate(
    [[examples[i] for i in row] for row in packed], T, P, len(packed)
  )
  assert (fit, rows) == (1.0, len(packed))
  assert tokens == pytest.approx((batch["segment"] > 0).mean())
  assert patches == pytest.approx((batch["patch_image"] > 0).mean())


def test_the_page_holds_examples_and_no_markup_of_the_data(tmp_path, capsys):
  layouts.media_files(tmp_path)
  hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>"
  lines = [
    {**layouts.task(i), "id": f"{hostile}{i}", "answer": hostile} for i in range(6)
  ]
  lines += [{**layouts.task(0), "question": hostile}, {"nothing": 1}, "{"]
  (tmp_path / "x.jsonl").write_text(
    "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
  )
  out = tmp_path / "page" / "x.html"
  text = run(capsys, "jsonl:x.jsonl", f"--root={tmp_path}", f"--out={out}")
  assert str(out) in text and "set aside" in text and "7 question, image" in text
  page = out.read_text()
  assert page.count('<section class="trajectory">') == 7
  assert page.count("data:image/jpeg;base64,") >= 7
  assert "<script" not in page and "<img src=x" not in page
  assert "&lt;script&gt;" in page
  # ---- what was set aside, with the record and its picture ----
  faults = page.partition('<ul class="faults">')[2].partition("</ul>")[0]
  assert faults.count("<li>") == 2 and "{&quot;nothing&quot;: 1}" in faults


def test_a_world_without_files_and_a_uri_that_opens_nothing(capsys):
  text = run(capsys, "world:val", "--records=40")
  kinds = dict((k, int(n)) for n, k in re.findall(r"(\d+) question, (\w+)", text))
  assert sum(kinds.values()) == 40 and 2 <= kinds["video"] <= 20
  for arguments in (["jsonl:none.jsonl"], ["world:val", "--patches=100"]):
    with pytest.raises(SystemExit) as stopped:
      run(capsys, *arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_ids_that_several_records_share_are_counted(tmp_path, capsys):
  layouts.media_files(tmp_path)
  rows = [{**layouts.task(i), "id": "same" if i < 3 else f"q{i}"} for i in range(5)]
  (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
  assert inspect_data.main(["jsonl:x.jsonl", f"--root={tmp_path}"]) == 0
  told = capsys.readouterr().out
  assert "ids that several records share: 1, by 3 records, the first is 'same'" in told


def test_data_without_a_good_record_is_a_failure(tmp_path):
  (tmp_path / "x.jsonl").write_text('{"what": 1}\n{"what": 2}\n')
  assert inspect_data.main(["jsonl:x.jsonl", f"--root={tmp_path}"]) == 1
  uri = layouts.text_only(tmp_path, 4)
  assert inspect_data.main([uri, f"--root={tmp_path}"]) == 0


def test_the_page_colours_what_is_learned_and_is_open_to_all(tmp_path):
  """Of traces with planted mistakes, in a browser."""
  uri = layouts.pixel_reasoner_sft(tmp_path, 8)
  out = tmp_path / "page.html"
  inspect_data.main([uri, f"--root={tmp_path}", f"--out={out}", "--tokens=1024"])
  with apps.chromium() as browser:
    page = browser.new_page()
    page.goto(out.as_uri())
    learned = page.locator(".masks .learned").all_inner_texts()
    own = page.locator("section .masks .own").all_inner_texts()
    assert any("boxed" in text for text in learned) and own
    assert not any("picture" in text for text in learned)
    assert page.locator("section rect.call").count() > 0  # boxes are drawn
    assert page.locator(".bars").count() >= 6
    assert apps.serious(page) == []
