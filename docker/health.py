#!/usr/bin/env -S python3 -I -S
"""Exits 0 while this container's service is alive: its HTTP port answers, or each of its workers' event loops turns.

Runs every few seconds beside a busy service, so it takes the standard library only (50 ms of a processor).
"""

import os
import socket
import sys
import time
from http.client import HTTPConnection

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
            return check_port(int(setting_of(command, setting) or default))
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


def check_port(port: int) -> str:
    connection = HTTPConnection("127.0.0.1", port, timeout=4.0)
    try:
        connection.request("GET", "/live")
        status = connection.getresponse().status
    except OSError as error:
        return f"port {port}: {error}"
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
