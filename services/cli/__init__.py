"""The command line: `ghostserve`, a file for each subcommand, and the local clusters that some of them run."""

from services.cli.main import entry

__all__ = ["entry"]
