"""What keeps a run alive, from its first flag to its last checkpoint.

start.py       how an entry point starts and ends
settings.py    a mistake in the config is told in one line
policies.py    what can talk: model, parameters, tokenizer, codec
checkpoint.py  all that a resumed run needs, as one orbax step
lock.py        one run at a time in a workdir
metrics.py     metrics.jsonl, TensorBoard, the progress bar
optim.py       AdamW, schedules, what is frozen
preemption.py  SIGTERM and Ctrl-C save and leave
bucket.py      workdirs in gs://
"""
