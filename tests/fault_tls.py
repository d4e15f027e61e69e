"""A certificate for 127.0.0.1 that vouches for itself, so that TLS can be tested where there is no openssl program."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# Made for these tests alone, valid until 2120; nothing trusts it but them, so its key is no secret.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBdjCCARygAwIBAgIBATAKBggqhkjOPQQDAjAZMRcwFQYDVQQDDA5wcmVzZW5j
ZS10ZXN0czAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowGTEXMBUG
A1UEAwwOcHJlc2VuY2UtdGVzdHMwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARI
ygT2YwlWATrwY2AFmZjmFgQfUlH2kicn/hFWfKNTw1oLFqxplXRTglh4Wu9fK5VM
2h9je7kOtcda7p49YD7so1MwUTAPBgNVHRMBAf8EBTADAQH/MA8GA1UdEQQIMAaH
BH8AAAEwHQYDVR0OBBYEFBML8wMI1HA2K6gX3p76jsZmRzuoMA4GA1UdDwEB/wQE
AwIChDAKBggqhkjOPQQDAgNIADBFAiEA5FfnVSqfbUFR9Q4crS4hTjHdmlRi0w3q
2iVNnyiKoakCIFp2rQBP3xlzII2kb+lN+iFj2RYtj6rvaGwKJc3MwQXb
-----END CERTIFICATE-----
"""

KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgq92arUvfmwdJG3Ox
OqaQQZ5MxM0mplPtAtwjs2l+G36hRANCAARIygT2YwlWATrwY2AFmZjmFgQfUlH2
kicn/hFWfKNTw1oLFqxplXRTglh4Wu9fK5VM2h9je7kOtcda7p49YD7s
-----END PRIVATE KEY-----
"""


def write_certificate(folder: Path) -> Path:
    """Write the certificate for a client to trust, and give its file."""
    file = folder / "certificate.pem"
    file.write_text(CERTIFICATE)
    return file


def server_context(folder: Path) -> ssl.SSLContext:
    """Make what a server needs to show the certificate."""
    key = folder / "key.pem"
    key.write_text(KEY)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(write_certificate(folder), key)
    return context
