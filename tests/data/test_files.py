"""Data files are read where they lie, or fetched once from an address."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import TypeAdapter

from rlhf_kit.data.config import DataConfig
from rlhf_kit.data.files import local_file
from rlhf_kit.data.load import load_data
from rlhf_kit.errors import RunError


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server of `tmp_path/served`: its address, and the paths that were asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "served"))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", asked
        http.shutdown()


def test_an_address_is_fetched_once_and_read_like_a_file(server, tmp_path) -> None:
    address, asked = server
    rows = [{"prompt": "p", "label": True}, {"prompt": "q", "label": False}]
    (tmp_path / "served" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = TypeAdapter(DataConfig).validate_python({"type": "jsonl", "path": f"{address}/rows.jsonl"})
    assert load_data(config).to_list() == load_data(config).to_list() == rows
    assert asked == ["/rows.jsonl"]


def test_files_of_one_name_at_two_addresses_are_two_files(server, tmp_path) -> None:
    address, _ = server
    for folder in ("a", "b"):
        (tmp_path / "served" / folder).mkdir()
        (tmp_path / "served" / folder / "rows.jsonl").write_text(folder)
    assert [local_file(f"{address}/{folder}/rows.jsonl").read_text() for folder in "ab"] == ["a", "b"]


def test_an_address_without_the_file_says_what_to_do_and_leaves_nothing(server, tmp_path) -> None:
    address, _ = server
    with pytest.raises(RunError, match=r"missing.jsonl cannot be read \(HTTP Error 404.*give its path instead"):
        local_file(f"{address}/missing.jsonl")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_server_that_is_not_there_is_the_same_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RunError, match="give its path instead"):
        local_file("http://127.0.0.1:9/rows.jsonl")


def test_a_file_here_is_itself(tmp_path) -> None:
    (tmp_path / "x").write_text("x")
    assert local_file(str(tmp_path / "x")) == tmp_path / "x"
    with pytest.raises(ValueError, match="there is no such file"):
        local_file(str(tmp_path / "y"))
