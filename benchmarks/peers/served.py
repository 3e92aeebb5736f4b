"""Servers beside which ours is measured; each is started as `python served.py NAME PORT FOLDER` in its environment.

hello and bare are limits, not competitors: uvicorn that answers the same bytes to everybody, and a handler that reads JSON, asks the compiled
model and writes JSON, with no validation, metrics, log or error handling.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))
NAME, PORT, FOLDER = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])


def run(app):
    import uvicorn
    uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning", access_log=False)


def answering(answer):
    "An ASGI application that hands the body to a function"
    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        told = answer(body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(told)).encode())]})
        await send({"type": "http.response.body", "body": told})
    return app


def hello():
    run(answering(lambda body: b'{"predictions":["late"]}'))


def bare():
    import msgspec

    from mlops_nb.bundle import load_bundle
    ask, read, write = load_bundle(FOLDER / "bundle").program.predict_rows, msgspec.json.Decoder().decode, msgspec.json.Encoder().encode
    run(answering(lambda body: write({"predictions": ask(read(body)["instances"])[0]})))


def rows_model():
    import pydantic
    from model import NUMBERS, WORDS
    row = pydantic.create_model("Row", **dict.fromkeys(NUMBERS, (float, ...)), **dict.fromkeys(WORDS, (str, ...)))
    return pydantic.create_model("Body", instances=(list[row], ...))


def by_fastapi(answer):
    from fastapi import FastAPI
    app, body = FastAPI(), rows_model()

    @app.post("/v1/models/m:predict")
    async def predict(asked: body):
        return {"predictions": answer([r.model_dump() for r in asked.instances])}
    run(app)


def fastapi_compiled():
    from mlops_nb.bundle import load_bundle
    ask = load_bundle(FOLDER / "bundle").program.predict_rows
    by_fastapi(lambda rows: ask(rows)[0])


def fastapi_onnx():
    import numpy as np
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    run_ = ort.InferenceSession(str(FOLDER / "whole.onnx"), options, providers=["CPUExecutionProvider"]).run
    by_fastapi(lambda rows: run_(None, {c: np.array([[r[c]] for r in rows], dtype=np.float32 if c[0] == "n" else object) for c in rows[0]})[0].tolist())


def fastapi_pipeline():
    import pandas as pd
    from model import fitted
    model = fitted()
    by_fastapi(lambda rows: model.predict(pd.DataFrame(rows)).tolist())


def kserve():
    from kserve import Model, ModelServer
    from model import answerer

    class Served(Model):
        def __init__(self):
            super().__init__("m")
            self.ask, self.ready = answerer(), True

        def predict(self, payload, headers=None):
            return {"predictions": self.ask(payload["instances"])}
    ModelServer(http_port=PORT, enable_grpc=False, workers=1).start([Served()])


if __name__ == "__main__":
    globals()[NAME]()
