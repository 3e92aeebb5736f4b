"""Alerts to real servers: HTTP, SMTP, Alertmanager; channels that are down, workers that are killed, two at once, ten thousand in a burst."""
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from servers import Server, binary
from waiting import until

from mlops_nb.alerting.channels import Undelivered, send
from mlops_nb.alerting.groups import alerts, prepare, record, silence, unsilence
from mlops_nb.alerting.outbox import deliver, enqueue
from mlops_nb.alerting.rules import judge
from mlops_nb.alerting.run import Alerting
from mlops_nb.alerting.settings import DEFAULT_RULES, alert_settings
from mlops_nb.audit import events, lock_state, open_state, transaction, verify


class Inbox:
    "An HTTP server that takes what comes, refuses it, or holds it until told"
    def __init__(self):
        self.got, self.status, self.hold, self.lock = [], 200, threading.Event(), threading.Lock()
        self.hold.set()
        inbox = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with inbox.lock:
                    if inbox.status == 200:
                        inbox.got.append(body)
                inbox.hold.wait(120)
                with contextlib.suppress(OSError):
                    self.send_response(inbox.status)
                    self.end_headers()
                    self.wfile.write(b"ok")             # what Slack says

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, *_):
                pass
        self.server = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"json://127.0.0.1:{self.server.server_port}/hook"

    def close(self):
        self.hold.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def inbox():
    made = Inbox()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_channels(monkeypatch):
    for name in [n for n in os.environ if n.startswith("MLOPS_NB_")]:
        monkeypatch.delenv(name)


class Mailbox:
    "A mail server that speaks as much SMTP as a client needs"
    def __init__(self):
        self.mails, self.refuse, started = [], False, threading.Event()

        def run():
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)
            self.server = self.loop.run_until_complete(asyncio.start_server(self.talk, "127.0.0.1", 0))
            self.port = self.server.sockets[0].getsockname()[1]
            started.set()
            self.loop.run_forever()
        threading.Thread(target=run, daemon=True).start()
        assert started.wait(180)

    async def talk(self, reader, writer):
        say = lambda text: writer.write(f"{text}\r\n".encode())  # noqa: E731
        say("220 here")
        to = []
        while line := await reader.readline():
            word = line.decode().strip().upper()
            if word.startswith("RCPT"):
                to.append(line.decode().split("<")[1].split(">")[0])
                say("450 try later" if self.refuse else "250 ok")
            elif word == "DATA":
                say("354 go on")
                text = b""
                while (part := await reader.readline()) != b".\r\n":
                    text += part
                self.mails.append((to, message_from_bytes(text)))
                to = []
                say("250 kept")
            elif word == "QUIT":
                say("221 bye")
                break
            else:
                say("250 ok")
        with contextlib.suppress(OSError):
            await writer.drain()
            writer.close()

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)


class Alertmanager(Server):
    "Debian's Alertmanager, without a cluster"
    def command(self):
        config = self.folder / "alertmanager.yml"
        config.write_text("route: {receiver: nobody, group_by: [alertname, model], group_wait: 1s, group_interval: 1s}\nreceivers: [{name: nobody}]\n")
        return [binary("prometheus-alertmanager") or "alertmanager", f"--config.file={config}", f"--storage.path={self.folder / 'data'}", f"--web.listen-address=127.0.0.1:{self.port}", "--cluster.listen-address="]

    def answers(self):
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{self.port}/-/ready", timeout=5).status_code == 200
        return False


def message(**more):
    return {"id": "n-1", "group": "flights/3:data_drift", "model": "flights", "model_id": "flights/3", "version": "3", "rule": "data_drift", "category": "data_quality", "severity": "medium",
            "urgency": "low", "tone": "medium", "title": "[MEDIUM] flights/3: drift in Zürich", "body": "month: 0.6\n", "at": 0.0, "report": "", "runbook": "docs/runbooks/data_drift.md", "covers": ["a"], **more}


def test_mail_arrives_and_a_server_that_refuses_it_is_asked_again(tmp_path, monkeypatch):
    box, wall = Mailbox(), [1364983200.0]
    monkeypatch.setattr("socket.getfqdn", lambda *_: "localhost")   # a machine without a name server would look for its name for seconds
    monkeypatch.setenv("MLOPS_NB_EMAIL_URL", f"mailto://127.0.0.1:{box.port}?from=alerts@example.org&to=ops@example.org")
    try:
        alerting = Alerting(tmp_path, {"hours": {"outside": []}, "routes": {"high": ["email"]}}, clock=lambda: wall[0])
        box.refuse = True
        assert alerting.observe({"model": "flights", "version": "3", "accuracy": 0.7, "baseline_accuracy": 0.8})["delivered"] == {"waiting": 1}
        box.refuse, wall[0] = False, wall[0] + 10
        assert alerting.deliver() == {"done": 1} and alerting.deliver() == {}
        [(to, mail)] = box.mails
        assert to == ["ops@example.org"] and "accuracy degradation: 0.7, baseline 0.8" in str(mail["subject"]).replace("\n", "")
        text = (mail.get_payload(0) if mail.is_multipart() else mail).get_payload(decode=True).decode()
        assert "What to do:" in text and "accuracy_degradation.md" in text and "Reference: n-" in text
    finally:
        box.close()


def test_slack_by_apprise_gets_a_message_that_mentions_nobody(inbox, monkeypatch):
    from apprise.plugins.slack import NotifySlack
    monkeypatch.setattr(NotifySlack, "webhook_url", f"http://127.0.0.1:{inbox.server.server_port}/services")
    monkeypatch.setenv("MLOPS_NB_SLACK_URL", "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#ops")
    [alert] = judge({"model": "m", "drift.scores": {"<!channel>": 0.5}})
    send("slack", message(title=alert.title))
    assert "drift score" in json.dumps(inbox.got) and "<!channel>" not in json.dumps(inbox.got)
    inbox.status = 404
    with pytest.raises(Undelivered) as refused:
        send("slack", message())
    assert "TIiajkdnlazkcOXrIdevi7FQ" not in str(refused.value)


@pytest.fixture(scope="module")
def alertmanager():
    if not (binary("prometheus-alertmanager") or binary("alertmanager")):
        pytest.skip("prometheus-alertmanager is not installed")
    made = Alertmanager().start()
    yield made
    made.close()


def test_alertmanager_has_the_alerts_groups_them_and_hears_of_their_end(tmp_path, monkeypatch, alertmanager):
    where = f"http://127.0.0.1:{alertmanager.port}"
    monkeypatch.setenv("MLOPS_NB_ALERTMANAGER_URL", where)
    alerting = Alerting(tmp_path, {})
    facts = {"model": "flights", "version": "3", "error_rate": 0.5, "drift.scores": {f"f{i}": 0.5 for i in range(700)}}
    done = alerting.observe(facts, now=1367366400)    # of 2013: the alert is old, and holds now
    assert done["delivered"] == {"done": 2} and done["incidents"] == [1]
    found = until(lambda: len(a := httpx.get(f"{where}/api/v2/alerts").json()) == 701 and a)
    labels = {a["labels"]["alertname"]: a["labels"] for a in found}
    assert labels["high_error_rate"]["severity"] == "critical" and labels["high_error_rate"]["version"] == "3"
    assert all(a["annotations"]["runbook_url"].startswith("docs/runbooks/") for a in found)
    groups = until(lambda: len(g := httpx.get(f"{where}/api/v2/alerts/groups").json()) == 2 and g)
    assert sorted(len(g["alerts"]) for g in groups) == [1, 700]
    alerting.observe({**facts, "error_rate": 0.0}, now=1367370000)
    until(lambda: "high_error_rate" not in {a["labels"]["alertname"] for a in httpx.get(f"{where}/api/v2/alerts").json()})


def test_alertmanager_that_was_down_hears_of_everything_later(tmp_path, monkeypatch, alertmanager):
    monkeypatch.setenv("MLOPS_NB_ALERTMANAGER_URL", "http://127.0.0.1:9")
    wall = [time.time() - 100]
    alerting = Alerting(tmp_path, {}, clock=lambda: wall[0])
    assert alerting.observe({"model": "late", "missing_rate": 0.5})["delivered"] == {"waiting": 1}
    monkeypatch.setenv("MLOPS_NB_ALERTMANAGER_URL", f"http://127.0.0.1:{alertmanager.port}")
    wall[0] += 100
    assert alerting.deliver() == {"done": 1}
    until(lambda: "late" in {a["labels"]["model"] for a in httpx.get(f"http://127.0.0.1:{alertmanager.port}/api/v2/alerts").json()})


def test_a_silence_is_made_and_ended_in_alertmanager_too_for_what_comes_from_here_alone(tmp_path, monkeypatch, alertmanager):
    where = f"http://127.0.0.1:{alertmanager.port}"
    quiet = lambda: sorted(a["labels"]["alertname"] for a in httpx.get(f"{where}/api/v2/alerts").json() if a["status"]["silencedBy"] and a["labels"]["model"] == "silent")  # noqa: E731
    monkeypatch.setenv("MLOPS_NB_ALERTMANAGER_URL", where)
    alerting = Alerting(tmp_path, {})
    alerting.observe({"model": "silent", "version": "3", "error_rate": 0.5, "drift.scores": {"a b": 0.5, "c": 0.5}})
    silence(alerting.engine, {"type": "nothing_*"}, 3600, "of no alert that is there", settings=alerting.settings)
    assert alerting.deliver() == {}
    for number, matcher, meant in ((2, {"type": "data_*"}, ["data_drift", "data_drift"]), (3, {"subject": "a?b"}, ["data_drift"])):
        assert silence(alerting.engine, matcher, 3600, "a season", settings=alerting.settings) == number
        assert alerting.deliver() == {"done": 1}
        assert until(lambda meant=meant: quiet() == meant)
        unsilence(alerting.engine, number, settings=alerting.settings)
        assert alerting.deliver()["done"] >= 1
        assert until(lambda: quiet() == [])
    monkeypatch.setenv("MLOPS_NB_ALERTMANAGER_URL", "http://127.0.0.1:9")       # ended before Alertmanager is back: it never hears of it
    silence(alerting.engine, {"severity": "critical"}, 3600, "away", settings=alerting.settings)
    unsilence(alerting.engine, 4, settings=alerting.settings)
    alerting.deliver()
    monkeypatch.setenv("MLOPS_NB_ALERTMANAGER_URL", where)
    until(lambda: alerting.deliver() is not None and set(alerting.counts()) == {"done"})
    assert quiet() == []


@pytest.fixture(params=["sqlite", "postgresql"])
def state(request, tmp_path):
    "URL of an empty state database"
    return f"sqlite:///{tmp_path / 'state.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres").new_database()


@pytest.mark.drill
def test_ten_thousand_alerts_in_a_burst_are_a_few_messages_each_once_and_none_is_lost(state, inbox, monkeypatch):
    monkeypatch.setenv("MLOPS_NB_SLACK_URL", inbox.url)
    settings, wall, covered = alert_settings({"hours": {"outside": []}}), [1364983200.0], Counter()
    engine = prepare(open_state(state))
    clock = lambda: wall[0]  # noqa: E731
    inbox.status = 503
    for part in range(10):                              # ten models, each a thousand features in two judgements; the channel is down for the first half
        if part == 5:
            inbox.status = 200
        for half in (range(500), range(500, 1000)):
            record(engine, judge({"model": f"m{part}", "drift.scores": {f"f{i}": 0.5 for i in half}}, settings, wall[0]), settings, clock)
        wall[0] += 60
        deliver(engine, settings, clock)
    wall[0] += 400
    alerting = Alerting(config=settings, url=state, clock=clock)
    while alerting.deliver() or alerting.counts().get("waiting"):
        wall[0] += 30
    assert len(alerts(engine, limit=20_000)) == 10_000 and all(a["told"] for a in alerts(engine, limit=20_000))
    for got in inbox.got:
        model, n = got["title"].split("] ")[1].split(":")[0], int(got["title"].split(" in ")[1].split()[0])
        covered[model] = max(covered[model], n)
    assert covered == {f"m{i}": 1000 for i in range(10)}          # every alert is in a message
    assert 10 <= len(inbox.got) <= 20                             # which are few
    assert len({g["message"].split("Reference: ")[1] for g in inbox.got}) == len(inbox.got) == alerting.counts()["done"]  # and each came once
    assert verify(engine)["ok"]
    assert len(events(engine, action="alerted")) <= 20


WORKER = """
import sys
from mlops_nb.alerting.run import Alerting
from mlops_nb.alerting.settings import alert_settings
print("ready", flush=True)
sys.stdin.readline()
print(Alerting(config={"lease": float(sys.argv[2]), "hours": {"outside": []}}, url=sys.argv[1]).deliver(), flush=True)
"""


def worker(state, lease=600):
    "A process that delivers once it is told to; what it has taken is its own for so many seconds"
    made = subprocess.Popen([sys.executable, "-c", WORKER, state, str(lease)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert made.stdout.readline() == "ready\n"
    return made


def fill(state, n):
    "So many messages of as many groups"
    engine = prepare(open_state(state))
    with transaction(engine) as connection:
        lock_state(connection)
        for i in range(n):
            enqueue(connection, "slack", message(group=f"g{i}", title=f"message {i}"), 0.0)
    return engine


@pytest.mark.drill
def test_a_worker_killed_while_it_delivers_loses_nothing(state, inbox, monkeypatch):
    monkeypatch.setenv("MLOPS_NB_SLACK_URL", inbox.url)
    fill(state, 3)
    inbox.hold.clear()
    first = worker(state, 2)
    first.stdin.write("\n")
    first.stdin.flush()
    until(lambda: inbox.got)                              # the message is on the other side, and not crossed off
    first.send_signal(signal.SIGKILL)
    first.wait()
    inbox.hold.set()
    alerting = Alerting(config={"lease": 2, "hours": {"outside": []}}, url=state)
    until(lambda: alerting.deliver() is not None and alerting.counts() == {"done": 3})
    titles = Counter(g["title"] for g in inbox.got)
    assert set(titles) == {"message 0", "message 1", "message 2"} and sum(titles.values()) <= 4
    twice = [g["message"] for g in inbox.got if titles[g["title"]] == 2]
    assert len(set(twice)) <= 1                           # told twice by the same reference


@pytest.mark.drill
def test_two_workers_at_once_deliver_each_message_once(state, inbox, monkeypatch):
    monkeypatch.setenv("MLOPS_NB_SLACK_URL", inbox.url)
    engine = fill(state, 40)
    two = [worker(state.replace("\0", "")) for _ in range(2)]
    for process in two:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in two:
        process.communicate(timeout=600)
    until(lambda: Alerting(config={"hours": {"outside": []}}, url=state).counts() == {"done": 40})
    assert Counter(g["title"] for g in inbox.got) == {f"message {i}": 1 for i in range(40)}
    engine.dispose()


def test_a_record_that_is_cut_short_has_not_happened(tmp_path, monkeypatch):
    engine, settings = prepare(open_state(f"sqlite:///{tmp_path / 'state.db'}")), alert_settings()
    verdicts = judge({"model": "m", "error_rate": 0.5}, settings, 0.0)
    with monkeypatch.context() as broken:
        broken.setattr("mlops_nb.alerting.groups._keep", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            record(engine, verdicts, settings)
    assert alerts(engine) == [] and events(engine) == []
    assert record(engine, verdicts, settings)["incidents"] == [1]


def test_every_rule_has_a_runbook(root):
    pages = {p.stem for p in (root / "docs/runbooks").glob("*.md")} - {"README"}
    assert pages == {*DEFAULT_RULES, "rollback"}                  # the last is what the rollout's guard tells
