"""A stand-in for the Hugging Face hub, its CDN and CIFAR-10's host, with faults to order.

The real client of huggingface_hub talks to it, unpatched, through HF_ENDPOINT. It answers on
127.0.0.1 as the hub does:

- HEAD /REPO/resolve/REVISION/FILE: a redirect to another host (the CDN), with X-Repo-Commit,
  X-Linked-Size and X-Linked-Etag, which is the file's SHA-256; with `xet` also X-Xet-Hash and where
  to get a token for that protocol;
- GET of the same: the redirect alone; GET or HEAD on the CDN: the bytes, whole or a Range of them;
- what is missing or closed: the status and X-Error-Code that the hub gives, with a body in JSON;
- the Xet protocol's token, and a store that answers its first question (how is the file cut?) with
  an error only.

A fault is ordered for a stage ("lookup", "file", "token", "store", "archive") and a word in
"GET /the/path": hub.order("file", "resnet", "silent midway"); with times=1 it strikes only once.
"""

import contextlib
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

COMMIT = "c0ffee" * 6 + "c0ff"
PORTAL = b"<html><title>Welcome</title><body>Log in to use this network.</body></html>" * 20
# What may go wrong with the bytes of a file, after an answer that is as it should be.
ON_BYTES = ("reset midway", "closed midway", "silent midway", "slow", "truncated", "damaged")
REFUSALS = {  # fault: status, X-Error-Code and X-Error-Message, as the hub sends them
    "missing file": (404, "EntryNotFound", "Entry not found"),
    "missing repository": (401, "RepoNotFound", "Repository not found"),
    "gated": (403, "GatedRepo", "Access to this model is restricted."),
}


@dataclass
class Fault:
    """What goes wrong, where, and how often."""

    stage: str
    word: str
    kind: str
    times: int = 10**9


@dataclass
class StandIn:
    """A hub (`url`), its CDN on another port, what they hold, the faults, all requests so far."""

    files: dict[str, bytes] = field(default_factory=dict)  # "timm/name/file" -> content
    xet: bool = False  # offer files by the Xet protocol too
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # "HEAD lookup /timm/name/resolve/main/file"
    pause: float = 0.1  # seconds between the pieces of a slow answer
    closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.servers = [Server(self, role) for role in ("hub", "cdn")]
        self.url, self.cdn = [f"http://127.0.0.1:{server.server_port}" for server in self.servers]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def order(self, stage: str, word: str, kind: str, times: int = 10**9) -> None:
        self.faults.append(Fault(stage, word, kind, times))

    def next_fault(self, stage: str, request: str) -> str:
        for fault in self.faults:
            if fault.stage != stage or fault.word not in request or fault.times == 0:
                continue
            if fault.kind not in ON_BYTES or request.startswith("GET"):  # a HEAD asks for no bytes
                fault.times -= 1
                return fault.kind
        return ""

    def count(self, text: str = "") -> int:
        return sum(text in request for request in self.requests)

    def close(self) -> None:
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()


class Server(http.server.ThreadingHTTPServer):
    """One port of the stand-in."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, standin: StandIn, role: str) -> None:
        self.standin, self.role = standin, role
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, *arguments) -> None:
        pass  # a client that hangs up is what is tested here


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request, or doesn't."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        standin, path = self.server.standin, self.path
        resolve = re.fullmatch(r"/(.+?)/resolve/[^/]+/([^?]+)", path)
        token = re.fullmatch(r"/api/models/(.+)/xet-read-token/.*", path)
        stage = "archive" if path.startswith("/archive/") else "file"
        if resolve or token or "/reconstructions/" in path:
            stage = "store"
        if resolve:
            stage = "lookup"
        elif token:
            stage = "token"
        standin.requests.append(f"{self.command} {stage} {path}")
        fault = standin.next_fault(stage, f"{self.command} {path}")
        if self.strike(fault):
            return
        if resolve:
            self.redirect("/".join(resolve.groups()))
        elif token:
            headers = {"X-Xet-Cas-Url": standin.cdn, "X-Xet-Access-Token": "token",
                       "X-Xet-Token-Expiration": str(int(time.time()) + 3600)}
            body = json.dumps(dict(casUrl=standin.cdn, accessToken="token"))
            self.send(200, body.encode(), headers)
        else:
            content = standin.files.get(path.removeprefix("/cdn/").removeprefix("/archive/"))
            if content is None:
                self.refuse("missing file")
            else:
                self.send_file(content, fault)

    def strike(self, fault: str) -> bool:
        """Commit a fault that replaces the answer; False: there is none, or one of the bytes."""
        if not fault or fault in ON_BYTES:
            return False
        if fault in REFUSALS:
            self.refuse(fault)
        elif fault == "429 in an hour":
            self.send(429, b"{}", {"Retry-After": "3600"})
        elif fault.isdigit():
            self.send(int(fault), b'{"error": "as ordered"}', {})
        elif fault == "empty page":
            self.send(200, b"", {})
        elif fault == "portal":
            self.send(200, PORTAL, {"Content-Type": "text/html"})
        elif fault == "no HTTP":
            self.connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
            self.hang_up()
        elif fault == "reset":
            self.hang_up(reset=True)
        elif fault == "closed":
            self.hang_up()
        elif fault == "silent":
            self.server.standin.closing.wait()
            self.hang_up()
        else:
            raise ValueError(f"no such fault: {fault}")
        return True

    def refuse(self, kind: str) -> None:
        status, code, message = REFUSALS[kind]
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": COMMIT}
        self.send(status, json.dumps(dict(error=message)).encode(), headers)

    def redirect(self, name: str) -> None:
        standin = self.server.standin
        content = standin.files.get(name)
        if content is None:
            known = name.rpartition("/")[0] in {file.rpartition("/")[0] for file in standin.files}
            return self.refuse("missing file" if known else "missing repository")
        digest = hashlib.sha256(content).hexdigest()
        headers = {"Location": f"{standin.cdn}/cdn/{name}", "X-Repo-Commit": COMMIT,
                   "X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"',
                   "ETag": f'"{digest[:40]}"', "Accept-Ranges": "bytes"}
        if standin.xet:
            route = f"{standin.url}/api/models/{name.rpartition('/')[0]}/xet-read-token/{COMMIT}"
            cut = f"{standin.cdn}/v1/reconstructions/{digest}"
            link = f'<{route}>; rel="xet-auth", <{cut}>; rel="xet-reconstruction-info"'
            headers |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": route, "Link": link}
        self.send(302, b"Found. Redirecting", headers)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, content: bytes, fault: str) -> None:
        """The bytes, or the Range asked for, with what may go wrong on the way."""
        if fault == "truncated":
            content = content[:len(content) * 2 // 3]
        if fault == "damaged":
            middle = len(content) // 4
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        part = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "slow":
            for place in range(0, len(part), max(1, len(content) // 10)):
                self.wfile.write(part[place:place + max(1, len(content) // 10)])
                self.wfile.flush()
                time.sleep(self.server.standin.pause)
            return
        if not fault.endswith("midway"):
            self.wfile.write(part)
            return
        self.wfile.write(part[:len(part) // 2])
        self.wfile.flush()
        time.sleep(0.05)
        if fault == "silent midway":
            self.server.standin.closing.wait()
        self.hang_up(reset=fault == "reset midway")

    def hang_up(self, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            if not reset:
                self.connection.shutdown(socket.SHUT_RDWR)
            self.connection.close()


def refusing_url() -> str:
    """The address of a port of this machine where nobody listens."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{port.getsockname()[1]}"


@contextlib.contextmanager
def dropping_url():
    """The address of a port that neither takes nor refuses: its queue is full, so packets drop."""
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(socket.socket())
        port.bind(("127.0.0.1", 0))
        port.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(port.getsockname())
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
