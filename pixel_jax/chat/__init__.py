"""Chat: from a question and its pictures to ids, and from sampled ids to an operation.

`tokenizer` knows ids, `template` knows turns, `tools` knows the protocol of the visual
operations, `encode` joins them into a growing `Trajectory`.  Host only: no jax.
"""
