"""Where and when a figure was measured."""

import platform
import re
from datetime import UTC, datetime
from pathlib import Path


def processor(*fields: str) -> str:
    """The processor's name, and what further fields of /proc/cpuinfo say, where there is such a file."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = [re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE) for field in ("model name", *fields)]
    return " ".join(line[1] for line in found if line) or platform.processor() or "unknown"


def part_of_a_file_name(text: str) -> str:
    """The text in lower case, with a dash for all that is neither a letter nor a digit."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def measured() -> dict[str, str]:
    """What every row of results keeps: processor, instruction set and day; rows of two are not compared."""
    from kegfast import build_info

    isa = str(build_info()["isa_active"] or "none")
    return {"processor": processor(), "isa_active": isa, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
