"""An OpenAI-compatible server on loopback that answers as a critic would, after a given latency; stdlib only.

    python benchmarks/slow_server.py SECONDS

Prints its port, and serves until it is killed. Every answer calls the first word of the completion good.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys

COMPLETION = re.compile(r"<<<BEGIN completion \w+\n(\S+)")


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, latency: float) -> None:
    """Answer the requests of one connection."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length: ")[1].split("\r\n")[0])
            request = json.loads(await reader.readexactly(length))
            await asyncio.sleep(latency)
            body = json.dumps(reply(request)).encode()
            lines = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(lines.encode() + body)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def reply(request: dict) -> dict:
    """A chat completion whose text is a critic's JSON."""
    found = COMPLETION.search(request["messages"][-1]["content"])
    spans = [{"quote": found[1], "verdict": "good", "occurrence": None}] if found else []
    message = {"role": "assistant", "content": json.dumps({"spans": spans})}
    usage = {"prompt_tokens": 200, "completion_tokens": 20, "total_tokens": 220}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


async def main(latency: float) -> None:
    """Listen on a free port."""
    server = await asyncio.start_server(lambda r, w: serve(r, w, latency), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
