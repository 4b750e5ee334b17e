"""`python -m services.cli` is `ghostserve`."""

from services.cli import entry

entry()
