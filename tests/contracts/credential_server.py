"""Who gives out credentials in a cloud, on loopback: to a pod, a machine, and a web identity.

Each request gets new ones, which end soon. As obstore asks five minutes before the end that it is
told, it is told one that is so much later.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

OBSTORE_MARGIN_S = 300.0
SECRET = "CredentialServerSecret-91c2"
ROLE = "/latest/meta-data/iam/security-credentials/"
STS = """<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>
<AccessKeyId>{AccessKeyId}</AccessKeyId><SecretAccessKey>{SecretAccessKey}</SecretAccessKey>
<SessionToken>{Token}</SessionToken><Expiration>{Expiration}</Expiration>
</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


@dataclass
class CredentialServer:
    """Gives out credentials.

    Attributes:
        lifetime_s: after which they are to be renewed; a second later they are refused.
        asked: the path of each request for some.
    """

    lifetime_s: float = 0.5
    url: str = ""
    asked: list[str] = field(default_factory=list)
    _ends_s: dict[str, float] = field(default_factory=dict)

    def is_valid(self, key: str) -> bool:
        """Whether a key was given out here, and has not ended."""
        return time.monotonic() < self._ends_s.get(key, 0.0)

    def new(self, path: str) -> dict[str, str]:
        """New credentials, as a machine's metadata have them."""
        self.asked.append(path)
        key = f"TEMPORARY{len(self.asked):04d}"
        self._ends_s[key] = time.monotonic() + self.lifetime_s + 1.0
        ends_at = datetime.now(UTC) + timedelta(seconds=OBSTORE_MARGIN_S + self.lifetime_s)
        return {
            "Code": "Success",
            "AccessKeyId": key,
            "SecretAccessKey": SECRET,
            "Token": f"{SECRET}-session",
            "Expiration": ends_at.isoformat(),
        }


def _handler(server: CredentialServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == ROLE:
                self._tell("a-role")
            else:
                self._tell(json.dumps(server.new(self.path)))

        def do_PUT(self) -> None:
            self._tell("a-token-for-metadata")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = server.new(self.path)
            if self.path == "/google":
                told = {"access_token": found["AccessKeyId"], "token_type": "Bearer"}
                self._tell(json.dumps({**told, "expires_in": 1}))
            else:
                self._tell(STS.format(**found))

        def _tell(self, text: str) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return Handler


def make_certificates(folder: Path) -> Path:
    """A key and a chain for 127.0.0.1 in a folder; returns the file of who vouches for it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now, keys = datetime.now(UTC), [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [
        x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])
        for name in ("tests of Holdfast", "127.0.0.1")
    ]
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    for name, key, is_authority in zip(("ca", "own"), keys, (True, False), strict=True):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(names[name == "own"])
            .issuer_name(names[0])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(address, critical=False)
            .sign(keys[0], hashes.SHA256())
        )
        encoded = certificate.public_bytes(serialization.Encoding.PEM)
        (folder / f"{name}.pem").write_bytes(encoded)
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(keys[1].private_bytes(serialization.Encoding.PEM, *plain))
    return folder / "ca.pem"


@contextmanager
def credential_server(certificates: Path | None = None) -> Iterator[CredentialServer]:
    """Such a server while the block runs; by TLS with what ``make_certificates`` has made."""
    server = CredentialServer()
    listening = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    server.url = f"http://127.0.0.1:{listening.server_address[1]}"
    if certificates is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "own.pem", certificates / "key.pem")
        listening.socket = context.wrap_socket(listening.socket, server_side=True)
        server.url = server.url.replace("http:", "https:")
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join(10)
