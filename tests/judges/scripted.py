"""A real HTTP server on loopback that answers as a test says: chat completions, and every way of failing."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

HANG = 3600.0  # seconds


@dataclass(frozen=True)
class Reply:
    """What the server does with a request.

    Attributes:
        text: what the model says.
        top: the likeliest first tokens and their log-probabilities.
        finish: why the model stopped.
        status: of the HTTP response; other than 200 it carries `text` as the error's message.
        headers: besides those of every response.
        body: the response's body instead of a chat completion.
        delay: seconds before the response.
        how: `whole`; `hang`: no response; `trickle`: a byte of it every 50 ms; `half`: the connection is closed in
            its middle; `drop`: the connection is closed instead.
    """

    text: str = "yes"
    top: Sequence[tuple[str, float]] | None = None
    finish: str = "stop"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    delay: float = 0.0
    how: Literal["whole", "hang", "trickle", "half", "drop"] = "whole"

    def content(self, request: Mapping[str, Any]) -> bytes:
        """The response's body."""
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps({"error": {"message": self.text, "type": "scripted"}}).encode()
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": self.text},
            "finish_reason": self.finish,
        }
        if self.top is not None:
            shown = [{"token": token, "logprob": value, "bytes": None} for token, value in self.top]
            choice["logprobs"] = {"content": [{"token": shown[0]["token"], "logprob": 0, "top_logprobs": shown}]}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"], "usage": usage}
        return json.dumps({**reply, "choices": [choice]}).encode()


Script = Callable[[dict[str, Any], int], Reply]


class ScriptedServer:
    """Answers each request as `script(request, number)` says; requests are numbered from 0, and kept."""

    def __init__(self, script: Script | None = None) -> None:
        self.script: Script = script or (lambda request, number: Reply())
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = 0  # the most requests that were open together
        self.port = 0
        self._open = 0
        self._connections: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None

    @property
    def base_url(self) -> str:
        """What a client is given."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def start(self) -> None:
        """Listen, after `stop` on the same port."""
        self._run(self._start())

    def stop(self) -> None:
        """Die: close the port, and all connections in the middle of what they are at."""
        self._run(self._stop())

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except asyncio.CancelledError:
            writer.transport.abort()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        request = json.loads(await reader.readexactly(int(headers.get("content-length", "0"))))
        number = len(self.requests)
        self.requests.append(request)
        self.headers.append(headers)
        self._open += 1
        self.at_once = max(self.at_once, self._open)
        try:
            return await self._respond(writer, request, self.script(request, number))
        finally:
            self._open -= 1

    async def _respond(self, writer: asyncio.StreamWriter, request: dict[str, Any], reply: Reply) -> bool:
        await asyncio.sleep(HANG if reply.how == "hang" else reply.delay)
        if reply.how == "drop":
            return False
        body = reply.content(request)
        lines = {"content-type": "application/json", "content-length": str(len(body)), **reply.headers}
        head = f"HTTP/1.1 {reply.status} -\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        whole = head.encode() + b"\r\n" + body
        if reply.how == "half":
            writer.write(whole[: len(whole) - len(body) // 2])
            await writer.drain()
            return False
        if reply.how == "trickle":
            for place in range(len(whole)):
                writer.write(whole[place : place + 1])
                await writer.drain()
                await asyncio.sleep(0.05)
            return True
        writer.write(whole)
        await writer.drain()
        return True


def asked(request: Mapping[str, Any]) -> str:
    """The last message of a request."""
    return request["messages"][-1]["content"]
