"""Data: questions and traces -> packed rows.

world.py       the tiny world: scenes, drawn from a seed
synthesize.py  a question and its cue -> a trace of operations
boxes.py       boxes and frames: of a cue, beside it, around it
sources.py     random access to the questions and traces of a file or a world
pack.py        examples -> rows of tokens and patches
pipeline.py    grain: source -> encode -> pack -> batches, resumable

Synthesis with a teacher (tools/synthesize.py, docs/synthesis.md):
teacher.py     requests to a model: retries, rate, budget
journal.py     what was asked, answered and spent, on disk
prompts.py     what is asked, and what is taken from a reply
checks.py      which traces would teach the wrong thing
distill.py     seeds and a teacher -> traces, in order
export.py      traces as PixelReasoner-SFT-Data
"""
