"""Judges: language models that are asked about text, on a server or in this process."""
