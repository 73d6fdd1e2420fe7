"""Records the answers FIRST, FIRST + 1, ... in a cache, and says a line for each that is recorded."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlhf_kit.judges.base import Answer
from rlhf_kit.judges.cache import AnswerCache, request_key

cache = AnswerCache(Path(sys.argv[1]))
for number in range(int(sys.argv[2]), int(sys.argv[2]) + int(sys.argv[3])):
    cache.put(request_key({"n": number}), Answer(f"answer {number}"))
    print(number, flush=True)
