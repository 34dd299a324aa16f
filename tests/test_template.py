"""chat/template.py: the same bytes as HF's jinja rendering of Qwen2.5-VL's template."""

import json
import pathlib

import pytest

from pixel_jax.chat import template

# Recorded with transformers' apply_chat_template and the template of Qwen2.5-VL (1017
# characters, sha256 in the file).  The template itself is not in transformers.
GOLDEN = json.loads(
  (pathlib.Path(__file__).parent / "golden/chat_renderings.json").read_text("utf-8")
)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_rendering_equals_hf(case):
  parts = template.prompt(case["messages"], generation=case["generation"])
  assert template.render(parts) == case["text"]


def test_goldens_are_of_the_released_template():
  expected = "a0bc6f6fc7a29a80017a433e8f03a1cc1236e838a944a2d034295a60c4f2fddb"
  assert GOLDEN["template_sha256"] == expected
  text = "".join(case["text"] for case in GOLDEN["cases"])
  for what in (template.IMAGE, template.VIDEO, template.SYSTEM, template.GENERATION):
    assert what in text  # the cases reach every branch


def test_only_the_users_text_is_untrusted():
  messages = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
    {"role": "assistant", "content": "A"},
    {"role": "tool", "content": "T"},
  ]
  parts = template.prompt(messages)
  assert [text for text, control in parts if not control] == ["Q", "T"]
  assert parts[-1] == ("<|im_start|>assistant\n", True)
