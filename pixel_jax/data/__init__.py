"""Data: questions and traces -> packed rows.

world.py       the tiny world: scenes, drawn from a seed
synthesize.py  a question and its cue -> a trace of operations
records.py     random access to the rows of files: JSON, parquet, ArrayRecord, TFDS
formats.py     a row in its data set's layout -> a question or a trace
media.py       the name of a picture -> its pixels: file, archive, bytes, world
sources.py     a URI -> random access to questions and traces; mixtures, filters
pack.py        examples -> rows of tokens and patches
pipeline.py    grain: source -> encode -> pack -> batches, resumable
quarantine.py  records that cannot be used, and when they are too many
"""
