"""Evaluation: questions and a policy in, figures out.  The engine comes as an argument.

benchmark.py   what a benchmark is: its questions, words and rules; a file for each one
protocol.py    how a model is let loose on it, and the controls that show whether it looks
rules.py       how benchmarks score an answer, each as the program it is named after
notes.py       answers as they come, so that a kill loses none
report.py      rates with their 95 % intervals, and pairs of runs
exports.py     predictions for other harnesses
"""
