"""Benchmarks: each part of ours beside what a user would pick instead."""
