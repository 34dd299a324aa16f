"""Evaluation: questions and a policy in, figures out.  The engine comes as an argument.

protocol.py    how a policy is asked, and how its answer is judged
rules.py       how benchmarks score an answer, each as the program it is named after
report.py      rates with their 95 % intervals
benchmark.py   what is known of questions beyond their answers; a file for each one:
tiny_world.py  the world of `data/world.py`
"""
