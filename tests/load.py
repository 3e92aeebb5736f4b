"Clients that ask a server as fast as it answers, and remember what they were told."
import contextlib
import http.client
import json
import threading
import time
from collections import Counter
from urllib.parse import urlsplit


def ask(address, path, body=None, headers=None, seconds=100):
    "Status, headers in small letters and body of one request"
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=seconds)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if data is None else "POST", path, data, {"content-type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


class Load:
    "What some clients were told: `ids` of predictions, `statuses`, `broken` requests that got no answer, `refused` connections, the `spans` of time from question to answer"
    def __init__(self, address, path, body, headers=None):
        self.address, self.path, self.body = address, path, json.dumps(body).encode()
        self.headers = {"content-type": "application/json", **(headers or {})}
        self.ids, self.broken, self.refused, self.versions = [], [], [], []
        self.told, self.spans, self.stopping = [], [], False

    @property
    def statuses(self):
        "How often each status was the answer"
        return Counter(list(self.told))

    @property
    def seconds(self):
        "How long each answer took"
        return [end - start for start, end in list(self.spans)]

    def held(self, start, end):
        "Requests that were asked before and answered after: what went on from `start` to `end` held them up, as long as it took"
        return [span for span in list(self.spans) if span[0] <= start and end <= span[1]]

    def client(self):
        "Ask until told to stop; a new connection whenever the old one has ended"
        connection = None
        while not self.stopping:
            if connection is None:
                connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=100)
                try:
                    connection.connect()
                except OSError:
                    self.refused.append(time.perf_counter())
                    connection = None
                    time.sleep(0.02)
                    continue
            start = time.perf_counter()
            try:
                connection.request("POST", self.path, self.body, self.headers)
                answer = connection.getresponse()
                told = answer.read()
            except (OSError, http.client.HTTPException) as e:
                self.broken.append(repr(e))
                connection = None
                continue
            self.spans.append((start, time.perf_counter()))
            self.told.append(answer.status)
            if answer.status == 200:
                self.ids += answer.getheader("x-prediction-ids", "").split(",")
                self.versions.append((answer.getheader("x-model-version"), told))
            if answer.getheader("connection") == "close" or answer.will_close:
                connection.close()
                connection = None


@contextlib.contextmanager
def load(address, path, body, clients=4, headers=None):
    "Clients that ask until the block ends"
    made = Load(address, path, body, headers)
    threads = [threading.Thread(target=made.client, daemon=True) for _ in range(clients)]
    for t in threads:
        t.start()
    try:
        yield made
    finally:
        made.stopping = True
        for t in threads:
            t.join(110)
