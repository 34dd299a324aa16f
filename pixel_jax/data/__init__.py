"""Data: questions and traces -> packed rows.

sources.py     a URI -> random access to questions and traces; mixtures, filters
records.py     random access to the rows of files: JSON, parquet, ArrayRecord, TFDS
formats.py     a row in the layout of its data set -> a question or a trace
retell.py      a trace of another project -> ours, with exact ids
media.py       the name of a picture -> its pixels: file, archive, bytes, world
world.py       the tiny world: scenes, drawn from a seed
pack.py        examples -> rows of tokens and patches
pipeline.py    grain: source -> encode -> pack -> batches, resumable
stream.py      batches that are read ahead, and the state to resume from
quarantine.py  records that cannot be used, and when they are too many
"""
