"""With `push_to_hub` the exported model reaches a hub: a real client, and a small hub on this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_aTokenThatNobodyMaySee"

RECIPE = """
name: pushed
stages:
  start:
    type: sft
    model: {type: scratch, vocabulary: running_sums, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
            num_attention_heads: 2, max_position_embeddings: 32}
    data: {type: running_sums, size: 16, terms: 2, modulus: 5}
    trainer: {args: {per_device_train_batch_size: 8, max_steps: 1}}
  prm:
    type: reward
    model: {path: "${stages.start.model}"}
    beta: 0.25
    data: {type: sampled, model: "${stages.start.model}", verifier: exact, num_generations: 2, max_new_tokens: 4,
           prompts: {type: running_sums, size: 8, terms: 2, modulus: 5}}
    trainer: {args: {per_device_train_batch_size: 8, max_steps: 1, push_to_hub: true, hub_model_id: me/prm}}
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as an upload of small files needs."""

    files: dict[str, bytes]
    tokens: set[str | None]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.tokens.add(self.headers.get("Authorization"))
        if self.path.startswith("/api/repos/create"):
            self.answer({"url": f"http://{self.headers['Host']}/me/prm", "name": "me/prm", "id": "me/prm"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/me/prm/commit/1", "commitOid": "1" * 40, "success": True}
            )
        else:
            self.answer({})

    def do_GET(self) -> None:
        self.answer({"id": "me/prm", "sha": "1" * 40, "siblings": []})

    def answer(self, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("HubOfOneTest", (Hub,), {"files": {}, "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


def test_a_model_is_uploaded_with_its_record_and_the_token_stays_secret(
    hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    address, seen = hub
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": "hf"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "rlhf_kit", "train", "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    exported = tmp_path / "runs" / "pushed" / "prm" / "model"
    written = {path.name: path.read_bytes() for path in exported.iterdir() if path.is_file()}
    assert {name: seen.files.get(name) for name in written} == written
    assert json.loads(seen.files["prm.json"])["beta"] == 0.25
    assert seen.tokens == {f"Bearer {TOKEN}"}
    kept = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in kept)
    assert TOKEN not in done.stdout + done.stderr
