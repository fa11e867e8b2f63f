"""Where and when a figure was measured."""

import platform
import re
from datetime import UTC, datetime
from pathlib import Path


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    return model[1] if model else platform.processor()


def measured() -> dict[str, str]:
    """What every row of results keeps: processor, instruction set and day; rows of two are not compared."""
    from kegfast import build_info

    isa = str(build_info().get("isa_active", "none"))
    return {"processor": processor(), "isa_active": isa, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
