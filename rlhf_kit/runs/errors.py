"""The error of everything that reads or writes run folders."""

from __future__ import annotations


class RunError(Exception):
    """A run folder that cannot be used as asked; the command line shows it as one line."""
