"""A small server of Google's XML interface: what the client sends of it, and no more.

No emulator that can be had keeps the conditions of uploads that the client sends. Of Google's
documentation: "Request preconditions" (a generation of 0 is an object that is not there; 412 where
one does not hold), "PUT Object" and "Multipart uploads" (x-goog-generation in each answer that made
an object), "List objects" (version 2, sorted, pages with a token), "Range" (206).

It is started with a port: ``python google_server.py 4711``. Objects are kept in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
import threading
from collections import defaultdict
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import gmtime, strftime, time
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000
BUCKETS = ("battery", "runs")
PART = re.compile(r"<PartNumber>([0-9]+)</PartNumber>")
RANGE = re.compile(r"bytes=([0-9]+)-([0-9]*)")


class Stored(NamedTuple):
    content: bytes
    generation: int
    written_s: float

    @property
    def tag(self) -> str:
        return f'"{hashlib.md5(self.content, usedforsecurity=False).hexdigest()}"'


class Bucket:
    """Objects by name; each write is one step under the lock, its condition included."""

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.lock = threading.Lock()
        self._generations = itertools.count(int(time() * 1e6))

    def put(self, name: str, content: bytes, condition: str | None) -> Stored | None:
        with self.lock:
            known = self.objects.get(name)
            there = str(known.generation) if known is not None else "0"
            if condition is not None and condition != there:
                return None
            self.objects[name] = Stored(content, next(self._generations), time())
            return self.objects[name]


buckets: defaultdict[str, Bucket] = defaultdict(Bucket)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(60)

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""

    def _asked(self) -> tuple[Bucket | None, str, dict[str, str]]:
        parts = urlsplit(self.path)
        bucket, _, name = parts.path.lstrip("/").partition("/")
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        if bucket not in BUCKETS:
            self._refuse(404, "NoSuchBucket")
            return None, "", {}
        return buckets[bucket], unquote(name), query

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code></Error>"
        self._answer(status, body.encode(), Content_Type="application/xml; charset=UTF-8")

    def _made(self, stored: Stored | None, body: bytes = b"") -> None:
        if stored is None:
            self._refuse(412, "PreconditionFailed")
            return
        self._answer(200, body, ETag=stored.tag, x_goog_generation=str(stored.generation))

    def do_PUT(self) -> None:
        content = self._body()
        bucket, name, query = self._asked()
        if bucket is None:
            return
        if "uploadId" in query:
            with bucket.lock:
                parts = bucket.uploads.get(query["uploadId"])
                if parts is not None:
                    parts[int(query["partNumber"])] = content
            if parts is None:
                self._refuse(404, "NoSuchUpload")
            else:
                self._answer(200, ETag=Stored(content, 0, 0.0).tag)
            return
        self._made(bucket.put(name, content, self.headers.get("x-goog-if-generation-match")))

    def do_POST(self) -> None:
        content = self._body()
        bucket, name, query = self._asked()
        if bucket is None:
            return
        if "uploads" in query:
            with bucket.lock:
                upload = f"upload-{len(bucket.uploads)}-{time():.6f}"
                bucket.uploads[upload] = {}
            told = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId>"
            self._answer(200, f"{told}</InitiateMultipartUploadResult>".encode())
            return
        with bucket.lock:
            parts = bucket.uploads.pop(query.get("uploadId", ""), None)
        if parts is None:
            self._refuse(404, "NoSuchUpload")
            return
        named = [int(number) for number in PART.findall(content.decode())]
        whole = bucket.put(name, b"".join(parts[number] for number in named), None)
        assert whole is not None
        told = f"<ETag>{escape(whole.tag)}</ETag>"
        told = f"<CompleteMultipartUploadResult>{told}</CompleteMultipartUploadResult>"
        self._made(whole, told.encode())

    def do_DELETE(self) -> None:
        bucket, name, query = self._asked()
        if bucket is None:
            return
        with bucket.lock:
            found = (
                bucket.uploads.pop(query["uploadId"], None)
                if "uploadId" in query
                else bucket.objects.pop(name, None)
            )
        if found is None:
            self._refuse(404, "NoSuchKey")
        else:
            self._answer(204)

    def do_GET(self) -> None:
        bucket, name, query = self._asked()
        if bucket is None:
            return
        if not name:
            self._list(bucket, query)
            return
        with bucket.lock:
            found = bucket.objects.get(name)
        if found is None:
            self._refuse(404, "NoSuchKey")
            return
        headers = {
            "ETag": found.tag,
            "x_goog_generation": str(found.generation),
            "Last_Modified": formatdate(found.written_s, usegmt=True),
        }
        part = RANGE.fullmatch(self.headers.get("Range") or "")
        if part is None:
            self._answer(200, found.content, **headers)
            return
        start, size = int(part[1]), len(found.content)
        end = min(int(part[2]) + 1 if part[2] else size, size)
        headers["Content_Range"] = f"bytes {start}-{end - 1}/{size}"
        self._answer(206, found.content[start:end], **headers)

    def _list(self, bucket: Bucket, query: dict[str, str]) -> None:
        prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
        size = min(int(query.get("max-keys", PAGE)), PAGE)
        with bucket.lock:
            names = sorted(n for n in bucket.objects if n.startswith(prefix) and n > after)
            page = [(name, bucket.objects[name]) for name in names[:size]]
        told = "".join(
            f"<Contents><Key>{escape(name)}</Key><Generation>{one.generation}</Generation>"
            f"<LastModified>{strftime('%Y-%m-%dT%H:%M:%S', gmtime(one.written_s))}.000Z"
            f"</LastModified><ETag>{escape(one.tag)}</ETag><Size>{len(one.content)}</Size>"
            f"</Contents>"
            for name, one in page
        )
        is_cut = len(names) > size
        told += f"<IsTruncated>{str(is_cut).lower()}</IsTruncated>"
        if is_cut:
            told += f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>"
        self._answer(200, f"<ListBucketResult>{told}</ListBucketResult>".encode())


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
