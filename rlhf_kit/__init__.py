"""Reinforcement learning of language models from dense and implicit rewards."""

__version__ = "0.1.0"
