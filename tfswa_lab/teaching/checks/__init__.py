"""Checks of the exercises, one module per lesson: `checks.lesson_01` and so on.

A check takes the reader's function, prints "passed: …" or "not yet: …" with a hint, and returns
whether it passed. The dummy value of an untouched exercise is no error, so that a lesson runs from
top to bottom before it is solved; an exception inside the reader's function is the reader's to see.

Notebook: 00_start_here
"""
