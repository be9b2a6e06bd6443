"""A stand-in for the Weights & Biases server: what the real client needs to log a run and go on with it.

It keeps what arrives in `runs` (id -> Run). `fault` makes it fail: a status (503), "reset" (the connection is closed)
or "hang" (no answer until the fault is taken away).
"""

import gzip
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from conftest import serving


@dataclass
class Run:
    rows: list = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    exit_code: int | None = None
    starts: int = 0


class Server:
    def __init__(self):
        self.runs: dict[str, Run] = {}
        self.fault = None
        self.requests = 0
        self.lock = threading.Lock()

    def answer(self, path: str, body: dict) -> dict:
        with self.lock:
            if path.endswith("/file_stream"):
                return self._stream(self.runs.setdefault(path.split("/")[-2], Run()), body)
            variables = body.get("variables") or {}
            match body.get("operationName"):
                case "Viewer":
                    return {"data": {"viewer": {"id": "1", "entity": "team", "flags": "{}", "teams": {"edges": []}}}}
                case "RunResumeStatus":
                    bucket = self._bucket(variables["name"]) if variables["name"] in self.runs else None
                    return {"data": {"model": {"id": "p", "bucket": bucket}}}
                case "UpsertBucket":
                    new = variables["name"] not in self.runs
                    run = self.runs.setdefault(variables["name"], Run())
                    run.starts += 1
                    run.config |= json.loads(variables.get("config") or "{}")
                    return {"data": {"upsertBucket": {"bucket": self._bucket(variables["name"]), "inserted": new}}}
                case "CreateRunFiles":
                    return {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}}
                case _:
                    return {"data": {"serverInfo": {"features": []}}}

    def _stream(self, run: Run, body: dict) -> dict:
        for name, part in (body.get("files") or {}).items():
            rows = [json.loads(text) for text in part["content"]] if name.endswith((".jsonl", "summary.json")) else []
            if name == "wandb-history.jsonl":
                run.rows[part["offset"] :] = rows
            elif name == "wandb-summary.json":
                run.summary = rows[-1]
        if body.get("complete"):
            run.exit_code = body.get("exitcode")
        return {}

    def _bucket(self, name: str) -> dict:
        run = self.runs[name]
        tail = json.dumps([json.dumps(run.rows[-1])] if run.rows else [])
        return {
            "id": name, "name": name, "displayName": name, "config": json.dumps(run.config),
            "historyLineCount": len(run.rows), "historyTail": tail,
            "eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0, "tags": [],
            "summaryMetrics": json.dumps(run.summary), "wandbConfig": json.dumps({"t": 1}),
            "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "team"}},
        }  # fmt: skip


@contextmanager
def wandb_server():
    """Run the stand-in on a free port of loopback; yields (server, base URL)."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            server.requests += 1
            while server.fault == "hang":
                time.sleep(0.02)
            if server.fault == "reset":
                self.close_connection = True
                self.connection.close()
                return
            status, reply = server.fault or 200, {}
            if status == 200:
                raw = gzip.decompress(raw) if self.headers.get("content-encoding") == "gzip" else raw
                reply = server.answer(self.path, json.loads(raw or b"{}"))
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_POST

        def log_message(self, *args): ...

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args): ...  # clients that gave up during a fault

    with serving(Quiet(("127.0.0.1", 0), Handler)) as url:
        try:
            yield server, url
        finally:
            server.fault = None
