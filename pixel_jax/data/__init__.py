"""Data: questions and traces -> packed rows.

world.py       the tiny world: scenes, drawn from a seed
synthesize.py  a question and its cue -> a trace of operations
boxes.py       boxes and frames: of a cue, beside it, around it
records.py     random access to the rows of files: JSON, parquet, ArrayRecord, TFDS
formats.py     a row in its data set's layout -> a question or a trace
media.py       the name of a picture -> its pixels: file, archive, bytes, world
sources.py     a URI -> random access to questions and traces; mixtures, filters
pack.py        examples -> rows of tokens and patches
pipeline.py    grain: source -> encode -> pack -> batches, resumable
quarantine.py  records that cannot be used, and when they are too many

Synthesis with a teacher (pixel-jax synthesize, docs/synthesis.md):
teacher.py     requests to a model: retries, rate, budget
journal.py     what was asked, answered and spent, on disk
prompts.py     what is asked, and what is taken from a reply
checks.py      which traces would teach the wrong thing
distill.py     seeds and a teacher -> traces, in order
export.py      traces as PixelReasoner-SFT-Data
"""
