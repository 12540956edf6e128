"""Checkers of the exercises: ``check("3.1", answer)`` says whether an answer is right, or what is off.

A checker computes what is right, on numbers that it draws, and compares. There is one file for each lesson.
"""

from checks.verdict import Verdict, check

__all__ = ["Verdict", "check"]
