"""Settings for every test: no network, no threads of the tokenizers' own, and slow is not wrong."""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("kit", deadline=None, max_examples=40)
settings.load_profile("kit")
