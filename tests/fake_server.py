"""An OpenAI-compatible server on 127.0.0.1 that misbehaves by script and counts what it is asked."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USAGE = {"prompt_tokens": 10, "completion_tokens": 5}


def ok(text="Because. So the answer is yes.", finish="stop", message=None, usage=USAGE, **more):
    """A well-formed reply, chat and completions in one."""
    message = {"role": "assistant", "content": text} if message is None else message
    choice = {"index": 0, "message": message, "text": text, "finish_reason": finish}
    body = {"id": "c1", "object": "chat.completion", "model": "fake-1", "choices": [choice]}
    return json_reply(200, {**body, "usage": usage, **more})


def json_reply(status, body, **headers):
    names = {k.replace("_", "-"): v for k, v in headers.items()}
    return raw(status, json.dumps(body).encode(), **{"content-type": "application/json", **names})


def error(status, message, code=None, param=None, **headers):
    body = {"message": message, "type": code or "error", "code": code, "param": param}
    return json_reply(status, {"error": body}, **headers)


def raw(status, data, cut=0, **headers):
    """A reply of `data` whose last `cut` bytes never come although they were announced."""

    def act(handler):
        handler.send_response(status)
        for name, value in {"content-length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data[: len(data) - cut])
        handler.close_connection = bool(cut)

    return act


def hang(seconds):
    return lambda handler: time.sleep(seconds)


def drop(handler):
    """Close the connection without a word."""
    handler.close_connection = True


def dribble(handler):
    """A byte now and then, for ever as the client sees it."""
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


class FakeServer(ThreadingHTTPServer):
    """`steps`: what the first, second, .. request gets; the last one holds from then on. Or
    `answer(body)` gives the step for a request."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *steps, answer=None, delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.steps, self.answer, self.delay = steps, answer, delay
        self.bodies, self.auths, self.times, self.served = [], [], [], 0
        self.headers, self.models, self.page, self.paths = [], [], None, []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a killed client hangs up on us: that is what it is for

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.bodies.append(body)
            server.auths.append(self.headers.get("authorization"))
            server.headers.append(self.headers)
            server.times.append(time.monotonic())
            n = len(server.bodies)
        time.sleep(server.delay)
        step = server.answer(body) if server.answer else server.steps[min(n, len(server.steps)) - 1]
        step(self)
        with server.lock:
            server.served += 1

    def do_GET(self):
        """`page` is what a GET gets, or else the list of `models`."""
        self.server.paths.append(self.path)
        models = {"data": [{"id": name} for name in self.server.models]}
        (self.server.page or json_reply(200, models))(self)

    def log_message(self, *args):
        pass
