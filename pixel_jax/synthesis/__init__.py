"""Synthesis: questions -> traces that a policy learns from in SFT.

templates.py   a question and its cue -> a trace of operations
boxes.py       boxes and frames: of a cue, beside it, around it

With a teacher (pixel-jax synthesize, docs/synthesis.md):
teacher.py     requests to a model: retries, rate, budget
journal.py     what was asked, answered and spent, on disk
prompts.py     what is asked, and what is taken from a reply
checks.py      which traces would teach the wrong thing
distill.py     questions and a teacher -> traces, in order
export.py      traces as PixelReasoner-SFT-Data
"""
