"""Data: questions and traces -> packed rows.

world.py       the tiny world: scenes, drawn from a seed
synthesize.py  a question and its cue -> a trace of operations
sources.py     random access to the questions and traces of a file or a world
pack.py        examples -> rows of tokens and patches
pipeline.py    grain: source -> encode -> pack -> batches, resumable
"""
