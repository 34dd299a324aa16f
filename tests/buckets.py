"""A cloud storage of one machine: enough of Google's JSON API for what we use of it.

gcsfs (STORAGE_EMULATOR_HOST), google-cloud-storage and tensorstore's C++ driver
(TENSORSTORE_GCS_HTTP_URL) all speak to it, so the tests run the real clients.  Objects
lie in memory; a generation counts the writes.
"""

import base64
import contextlib
import email.parser
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


class Storage(http.server.ThreadingHTTPServer):
  """`objects`: (bucket, name) -> (generation, bytes).  Serves until `shutdown`."""

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.url = f"http://127.0.0.1:{self.server_port}"
    self.objects: dict[tuple[str, str], tuple[int, bytes]] = {}
    self.uploads: dict[str, tuple[str, str, bytearray]] = {}
    self.writes = 0
    self.lock = threading.RLock()
    threading.Thread(target=self.serve_forever, daemon=True).start()

  def names(self, prefix: str) -> list[str]:
    bucket, _, rest = prefix.removeprefix("gs://").partition("/")
    return sorted(n for b, n in self.objects if b == bucket and n.startswith(rest))

  def read(self, url: str) -> bytes:
    bucket, _, name = url.removeprefix("gs://").partition("/")
    return self.objects[bucket, name][1]

  def put(self, bucket: str, name: str, data: bytes) -> dict:
    with self.lock:
      self.writes += 1
      self.objects[bucket, name] = (self.writes, data)
    return self.meta(bucket, name)

  def meta(self, bucket: str, name: str) -> dict:
    generation, data = self.objects[bucket, name]
    return {
      "kind": "storage#object",
      "id": f"{bucket}/{name}/{generation}",
      "name": name,
      "bucket": bucket,
      "generation": str(generation),
      "metageneration": "1",
      "size": str(len(data)),
      "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
      "updated": f"2026-01-01T00:00:00.{generation:06d}Z",
      "timeCreated": "2026-01-01T00:00:00.000Z",
      "storageClass": "STANDARD",
      "etag": str(generation),
    }


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: Storage

  def log_message(self, *_):
    pass

  def do_GET(self):
    self._answer("GET")

  def do_POST(self):
    self._answer("POST")

  def do_PUT(self):
    self._answer("PUT")

  def do_DELETE(self):
    self._answer("DELETE")

  def _body(self) -> bytes:
    if "chunked" not in self.headers.get("Transfer-Encoding", ""):
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    parts = []
    while size := int(self.rfile.readline(), 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(parts)

  def _answer(self, verb: str) -> None:
    body = self._body()
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    code, data, headers = self._do(verb, url.path, query, body)
    if isinstance(data, dict):
      data = json.dumps(data).encode()
      headers = {"Content-Type": "application/json"} | headers
    self.send_response(code)
    for k, v in ({"Content-Length": str(len(data))} | headers).items():
      self.send_header(k, v)
    self.end_headers()
    with contextlib.suppress(ConnectionError):  # a client may hang up once it knows
      self.wfile.write(data)

  def _do(self, verb, path, query, body):
    s = self.server
    if path.startswith("/batch/"):
      return self._batch(body)
    if m := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path):
      return self._upload(verb, m[1], query, body)
    if m := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
      return 200, {"kind": "storage#bucket", "id": m[1], "name": m[1]}, {}
    if m := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
      return 200, self._list(m[1], query), {}
    if m := re.fullmatch(
      r"/storage/v1/b/([^/]+)/o/(.+)/rewriteTo/b/([^/]+)/o/(.+)", path
    ):
      bucket, name, target, to = map(urllib.parse.unquote, m.groups())
      made = s.put(target, to, s.objects[bucket, name][1])
      return (
        200,
        {"kind": "storage#rewriteResponse", "done": True, "resource": made},
        {},
      )
    m = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", path)
    if not m:
      return 404, {"error": {"code": 404, "message": f"unknown {verb} {path}"}}, {}
    bucket, name = map(urllib.parse.unquote, m.groups())
    if (bucket, name) not in s.objects:
      return 404, {"error": {"code": 404, "message": "Not Found"}}, {}
    if verb == "DELETE":
      del s.objects[bucket, name]
      return 204, b"", {}
    if query.get("alt") != "media":
      return 200, s.meta(bucket, name), {}
    generation, data = s.objects[bucket, name]
    if query.get("ifGenerationNotMatch") == str(generation):
      return 304, b"", {}
    told = {"x-goog-generation": str(generation), "ETag": str(generation)}
    if wanted := self.headers.get("Range"):
      first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
      part = data[int(first) : int(last) + 1 if last else None]
      if not part and data:
        return 416, b"", {}
      told["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
      return 206, part, told
    return 200, data, told

  def _list(self, bucket, query):
    prefix, cut = query.get("prefix", ""), query.get("delimiter")
    first, last = query.get("startOffset", ""), query.get("endOffset")
    items, folders = [], {}
    for name in sorted(n for b, n in list(self.server.objects) if b == bucket):
      if not name.startswith(prefix) or name < first or (last and name >= last):
        continue
      rest = name[len(prefix) :]
      if cut and cut in rest:
        folders[prefix + rest.partition(cut)[0] + cut] = None
      else:
        items.append(self.server.meta(bucket, name))
    return {"kind": "storage#objects", "items": items, "prefixes": list(folders)}

  def _upload(self, verb, bucket, query, body):
    s, kind = self.server, query.get("uploadType")
    if "upload_id" in query:  # a piece of a resumable one
      bucket, name, data = s.uploads[query["upload_id"]]
      data += body
      if self.headers.get("Content-Range", "").endswith("/*"):
        return 308, b"", {"Range": f"bytes=0-{len(data) - 1}"}
      return 200, s.put(bucket, name, bytes(data)), {}
    if kind == "media":
      name, data = query["name"], body
    elif kind == "resumable":
      name = query.get("name") or json.loads(body)["name"]
      key = str(len(s.uploads))
      s.uploads[key] = (bucket, name, bytearray())
      where = f"{s.url}/upload/storage/v1/b/{bucket}/o?upload_id={key}"
      return 200, {}, {"Location": where}
    else:  # multipart: the name, then the bytes
      head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
      about, content = email.parser.BytesParser().parsebytes(head + body).get_payload()
      name = query.get("name") or json.loads(about.get_payload())["name"]
      data = content.get_payload(decode=True)
    have = s.objects.get((bucket, name), (0, b""))[0]
    if query.get("ifGenerationMatch", str(have)) != str(have):
      return 412, {"error": {"code": 412, "message": "conditionNotMet"}}, {}
    return 200, s.put(bucket, name, data), {}

  def _batch(self, body):
    """gcsfs removes many objects in one request of many requests."""
    mark = self.headers["Content-Type"].partition("boundary=")[2].strip('"')
    answers = []
    for path in re.findall(rb"DELETE (/storage/v1/b/\S+) HTTP", body):
      code, _, _ = self._do("DELETE", path.decode().partition("?")[0], {}, b"")
      answers.append(
        f"--{mark}\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {code} x\r\n\r\n\r\n"
      )
    data = ("".join(answers) + f"--{mark}--\r\n").encode()
    return 200, data, {"Content-Type": f"multipart/mixed; boundary={mark}"}
