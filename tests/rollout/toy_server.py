"""A small server to be rolled out: `python toy_server.py VERSION PORT FOLDER`; FOLDER/VERSION.json says how it misbehaves."""
import asyncio
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import uvicorn

VERSION, PORT, FOLDER = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
STATE = {"read": 0.0, "faults": {}}


def faults():
    "What FOLDER/VERSION.json says, read again five times a second"
    if time.monotonic() - STATE["read"] > 0.2:
        STATE["read"] = time.monotonic()
        try:
            STATE["faults"] = json.loads((FOLDER / f"{VERSION}.json").read_text())
        except (OSError, ValueError):
            STATE["faults"] = {}
    return STATE["faults"]


async def read(receive):
    "The body of a request"
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def app(scope, receive, send):
    "Answers with its version"
    if scope["type"] != "http":
        return
    found, status = faults(), 200
    if scope["path"] == "/ready":
        status = 503 if found.get("unready") else 200
    else:
        await asyncio.sleep(found.get("delay", 0.002))
        if random.random() < found.get("errors", 0):
            status = 500
        elif random.random() < found.get("refuse", 0) or found.get("unknown", "\0").encode() in await read(receive):
            status = 400
        if found.get("die") and random.random() < found["die"]:
            os._exit(1)
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json"), (b"x-model-version", VERSION.encode())]})
    await send({"type": "http.response.body", "body": json.dumps({"version": VERSION, "predictions": [1]}).encode()})


class Server(uvicorn.Server):
    "Goes on accepting for a second after SIGTERM, as the real one with --linger 1"

    async def shutdown(self, sockets=None):
        await asyncio.sleep(1)
        await super().shutdown(sockets)


if (FOLDER / f"{VERSION}.json").exists() and faults().get("broken"):
    sys.exit("cannot load the model")
signal.signal(signal.SIGINT, signal.SIG_IGN)
config = uvicorn.Config(app, port=PORT, log_level="warning", lifespan="off", timeout_keep_alive=65, access_log=False)
Server(config).run()
