"""The one place that states kegfast's version."""

__version__ = "0.1.0"
