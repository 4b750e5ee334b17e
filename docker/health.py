#!/usr/bin/env -S python3 -I -S
"""Exits 0 while this container's service is alive: its HTTP port answers, or each of its workers' event loops turns.

Runs every few seconds beside a busy service, so it takes the standard library only (50 ms of a processor).
"""

import os
import socket
import sys
import time
from http.client import HTTPConnection, HTTPException

ROLES = {"gateway": ("port", 8000), "coordinator": ("port", 8100), "parity-store": ("admin_port", 8201)}
STALE_S = 15.0


def main() -> str:
    """What is wrong; empty if nothing."""
    with open("/proc/1/cmdline", "rb") as file:
        command = [part.decode(errors="replace") for part in file.read().split(b"\0")]
    if any("ghost-redis" in part or "valkey-server" in part for part in command):
        return check_redis(6379)
    if "worker" in command:
        return check_files(os.environ["GHOST_ALIVE_DIR"])
    for role, (setting, default) in ROLES.items():
        if role in command:
            return check_port(*address_of(command, setting, default), tls=bool(setting_of(command, "tls_cert_file")))
    return f"no service in {command}"


def setting_of(command: list[str], name: str) -> str | None:
    """A setting as the service reads it: its flag, or else its variable."""
    flag = "--" + name.replace("_", "-")
    for index, part in enumerate(command):
        if part == flag:
            return command[index + 1]
        if part.startswith(flag + "="):
            return part.partition("=")[2]
    return os.environ.get("GHOST_" + name.upper())


def address_of(command: list[str], setting: str, default: int) -> tuple[str, int]:
    """Where the service is reached from within. Kubernetes' GHOST_PORT=tcp://... is no setting of the service's."""
    host = setting_of(command, "host") or "127.0.0.1"
    port = setting_of(command, setting) or ""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), int(port) if port.isdecimal() else default


def check_port(host: str, port: int, *, tls: bool) -> str:
    """Its own certificate is not verified: it is made out for the names by which others reach it."""
    if tls:
        import ssl
        from http.client import HTTPSConnection

        connection: HTTPConnection = HTTPSConnection(host, port, timeout=4.0, context=ssl._create_unverified_context())
    else:
        connection = HTTPConnection(host, port, timeout=4.0)
    try:
        connection.request("GET", "/live")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        return f"port {port}: {error or type(error).__name__}"
    return "" if status == 200 else f"port {port}: status {status}"


def check_redis(port: int) -> str:
    """Redis answers, if only that a password is missing."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=4.0) as connection:
            connection.sendall(b"PING\r\n")
            answer = connection.recv(64)
    except OSError as error:
        return f"port {port}: {error}"
    return "" if answer.startswith((b"+PONG", b"-NOAUTH")) else f"port {port}: {answer!r}"


def check_files(folder: str) -> str:
    """Each worker touches a file of its own every second."""
    ages = {entry.name: time.time() - entry.stat().st_mtime for entry in os.scandir(folder)}
    stale = {name: age for name, age in ages.items() if age > STALE_S}
    if not ages:
        return "no worker has begun"
    return ", ".join(f"{name}: no sign of life for {age:.0f} s" for name, age in stale.items())


if __name__ == "__main__":
    sys.exit(main() or None)
