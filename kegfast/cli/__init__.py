"""The command line: `kegfast <command>`, one module of this package each."""

from kegfast.cli.app import main

__all__ = ["main"]
