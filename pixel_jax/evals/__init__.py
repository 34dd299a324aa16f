"""Evaluation: tasks in, records and figures out.  The engine comes in as an argument."""
