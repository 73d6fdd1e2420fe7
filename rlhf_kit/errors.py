"""Errors that the command line shows as one line."""

from __future__ import annotations


class RunError(Exception):
    """A run cannot start or go on; the message says why and what to do."""
