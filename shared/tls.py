"""TLS by certificate files, optional, on every HTTP and WebSocket port, and for those who dial them.

Files are read once, when a service starts. The bulk transport has no TLS: see transport/base.py.
"""

import ssl

from shared.config import CommonSettings
from shared.errors import ConfigError


def server_context(settings: CommonSettings) -> ssl.SSLContext | None:
    """What a port of this service speaks; None for plain HTTP. Raises ConfigError for files that can't be."""
    if not settings.tls_cert_file and not settings.tls_key_file:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file or None)
    except (OSError, ssl.SSLError) as error:
        files = f"{settings.tls_cert_file!r} and key {settings.tls_key_file!r}"
        raise ConfigError(f"TLS certificate {files} can't be used: {error}") from error
    return context


def client_context(ca_file: str) -> ssl.SSLContext:
    """How https and wss servers are verified: by these authorities, or without a file the system's.

    Raises ConfigError for a file that can't be.
    """
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"TLS authorities {ca_file!r} can't be used: {error}") from error


def pinned_context(cert_file: str) -> ssl.SSLContext:
    """How a server of this very certificate is verified, by whatever name it is reached."""
    context = client_context(cert_file)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
