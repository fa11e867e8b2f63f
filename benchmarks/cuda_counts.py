"""What the CUDA kernels issue on an H200, counted in their machine code: python -m benchmarks.cuda_counts

Compiles the kernels for sm_90 with line numbers, counts each on the shapes of the tables (benchmarks/sass.py)
and writes benchmarks/results/cuda_counts.json, of which benchmarks.tables makes the tables of
docs/kernels/cuda.md. Wants nvcc, g++ for the plans, and nvdisasm (on PATH, beside nvcc, or from the package
nvidia-cuda-nvdisasm); no GPU.
"""

import argparse
import functools
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import sass
from benchmarks.common import RESULTS, ROOT, markdown_table
from kegfast._util.files import write_json

MULTIPROCESSORS, SCHEDULERS, HERTZ, BYTES = 132, 4, 1.755e9, 4.8e12  # of an H200
WARPS = 4  # of a Tucker-2 block
RESNET = ((64, 56), (128, 28), (256, 14), (512, 7))
BATCH = 128
SOURCES = ("tucker2", "diversity")


def nvdisasm() -> str | None:
    """The disassembler: on PATH, beside nvcc, or where pip installs it."""
    folders = [Path(nvcc).resolve().parent for nvcc in [shutil.which("nvcc")] if nvcc]
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        folders += sorted(Path(root).glob("*/bin"))
    return shutil.which("nvdisasm") or next(
        (str(found) for folder in folders if (found := folder / "nvdisasm").exists()), None
    )


def compiler() -> str:
    """nvcc and its version: another one's code has other counts."""
    text = subprocess.check_output(["nvcc", "--version"], text=True)
    return f"nvcc {re.search(r'release ([0-9.]+)', text)[1]}"


def disassembly(source: str, folder: Path) -> str:
    """Of csrc/cuda/<source>.cu, compiled for sm_90."""
    include = Path(torch.__file__).parent / "include"
    cubin = folder / f"{source}.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "-cubin", "-arch=sm_90", "-lineinfo", f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", str(include), "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    subprocess.check_call([*command, str(ROOT / f"csrc/cuda/{source}.cu"), "-o", str(cubin)])
    return disassembled(cubin)


def disassembled(cubin: Path) -> str:
    """With the source lines of every instruction, those that it was inlined from too."""
    return subprocess.check_output([nvdisasm() or "nvdisasm", "-c", "-gi", str(cubin)], text=True)


class Kernels:
    """The kernels of some disassemblies by a piece of their names, `Tucker2Persistent<bf16, 16>`."""

    def __init__(self, *disassemblies: str):
        parts = [part for text in disassemblies for part in sass.kernels(text)]
        names = subprocess.run(
            ["c++filt"],
            input="\n".join(name for name, _ in parts),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        self.texts: dict[str, str] = {}
        for name, (_, text) in zip(names, parts, strict=True):
            for prefix in ("kegfast::", "cuda::", "simt::"):
                name = name.replace(prefix, "")
            self.texts[name.split("enter<", 1)[1].rsplit(">(", 1)[0].strip()] = text

    @functools.cache  # noqa: B019  (as long as the process)
    def __getitem__(self, name: str) -> sass.Code:
        return sass.Code(self.texts[name])


def microseconds(warp_instructions: float) -> float:
    """The least time in which the device issues so many, spread evenly."""
    return warp_instructions / (MULTIPROCESSORS * SCHEDULERS * HERTZ) * 1e6


# ---- Tucker-2, bfloat16

ONLY_VECTORS: dict[sass.Piece, float] = dict.fromkeys(
    ("elements(stage, chunk)", "keep_t1(p, tile", "store_rows(p.t2", "store_rows(y, scratch"), 0.0
)
"""Of the fused form, where nothing is copied element by element and neither t1 nor t2 is kept."""
ONCE = {"simt.cuh": 1}  # waits, and the loops around bulk copies


def persistent(kernels: Kernels, rank: int, channels: int) -> float:
    """Warp instructions of a tile; what one thread asks of the copy engine is counted for its warp alone."""
    boxes = -(-channels // 64)
    trips = ONCE | {"int chunk = 0": boxes, "int ky": 3, "int kx": 3, "int column": boxes}
    code, one = kernels[f"Tucker2Persistent<bf16, {rank}>"], "int tile = block().x"
    asks = dict.fromkeys(("ask(p,", "bulk_store(p.y", "bulk_store_wait()"), 0.0)
    return code.issued(trips, {}, one) + (WARPS - 1) * code.issued(trips, asks, one)


def fused(kernels: Kernels, rank: int, channels: int, halo: int) -> float:
    """Warp instructions of a block."""
    tap = -(-rank * 2 // 32) * 32
    bytes_of = {"first": channels * 2, "core": 9 * tap, "last": tap}
    trips: dict[sass.Piece, float] = {
        "int s = thread()": math.ceil(9 * tap / 32 / 128),
        "int first_row": math.ceil(halo / 64),
        "column < p.first.rows": math.ceil(rank / 64),
        "column < p.core.rows": math.ceil(rank / 64),
        "column < p.last.rows": channels // 64,
        "int row = thread() / kRowPieces": 4,
    }
    shares = dict(ONLY_VECTORS)
    for factor, count in bytes_of.items():
        chunks, product = math.ceil(count / 128), f"product<M>(acc, p.{factor},"
        trips["int c = 0; c < chunks", product] = chunks
        shares["load(s, s)", product] = min(chunks, 2) / 2  # of the two that are asked for ahead
        shares["load(next,", product] = max(chunks - 2, 0) / chunks
    return WARPS * kernels["Tucker2Fused<Math<bf16, false>, 4>"].issued(trips, shares)


def tucker2(kernels: Kernels, device: Any) -> list[dict[str, Any]]:
    """A row a shape; `device`: the tests' emulator, for the plans."""
    rows = []
    for channels, size in RESNET:
        rank, moved = channels // 4, 2 * 2 * BATCH * channels * size * size
        row: dict[str, Any] = {"shape": f"{channels}@{size}", "bandwidth_us": moved / BYTES * 1e6}
        for form in ("fused", "persistent"):
            call = plan(device, channels, size, form)
            halo = (call.tile_h + 2) * (call.tile_w + 2)
            if form == "fused" and rank <= 64:
                issued = fused(kernels, rank, channels, halo)
                row[form] = {
                    "blocks": call.blocks,
                    "issued": issued,
                    "us": microseconds(issued * call.blocks),
                }
            elif form == "persistent" and call.persistent:
                issued = persistent(kernels, rank, channels)
                tiles = BATCH * -(-size // call.tile_h) * -(-size // call.tile_w)
                us = microseconds(issued * tiles)
                row[form] = {"tiles": tiles, "blocks": call.blocks, "issued": issued, "us": us}
        rows.append(row)
    return rows


def plan(device: Any, channels: int, size: int, form: str) -> Any:
    """The call that the layer with ranks C / 4 would make."""
    rank, one = channels // 4, (1, 1)
    x, core = (
        torch.empty(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        for shape in ((BATCH, channels, size, size), (rank, rank, 3, 3))
    )
    first, last = (
        torch.empty(*shape, 1, 1, dtype=torch.bfloat16) for shape in ((rank, channels), (channels, rank))
    )
    return device.tucker2(x, first, core, last, None, one, one, one, True, "ascending", form=form, dry=True)[
        -1
    ]


def chunk_of_the_fused_form(kernels: Kernels) -> dict[str, float]:
    """Instructions of a thread for 64 rows by one chunk of K."""
    code, found = kernels["Tucker2Fused<Math<bf16, false>, 4>"], {}
    for factor in ("first", "core", "last"):
        one = ("int c = 0; c < chunks", f"product<M>(acc, p.{factor},")
        found[factor] = code.issued({}, ONLY_VECTORS, one)
    return found


# ---- l1 diversity, float32

FEATURES, COLUMNS = 3072, 12  # of the noise table: 10 noises
SORTS = {256: 1, 1024: 4, 4096: 16}  # batch -> warps a feature


def diversity_sort(kernels: Kernels, batch: int) -> dict[str, float]:
    """Warp instructions a feature, forward and gradient, no ties; of them the network that sorts."""
    warps = SORTS[batch]
    code, team = kernels[f"DiversitySort<float, unsigned long, {warps}>"], warps * 32
    teams = max(8 // warps, 1)
    vectors = batch * 2 / (teams * team)  # of 16 bytes, a thread
    feature, short = "int f = team", "Sorter<kWarps, uint32_t>::sort(key"
    sizes, steps = ("int size = 2", short), ("int step = size / 4", short)
    passes = repairs(batch)
    trips: dict[sass.Piece, float] = {
        feature: 8 / teams,
        sizes: 0,
        "int pass = 0": passes,
        "int odd = 1": 2,
        "int at = t * kKeys + odd": 4,
        "int c = kColumns": COLUMNS / 4 - 1,
        "i < p.batch * vectors": vectors,
        "i < p.batch * kVectors": vectors / 4,  # unrolled by as many
    }
    other_ways = "add_columns(", "find_ties(", "load_rows<0>", "p.batch * p.block_features", "p.batch * count"
    never = dict.fromkeys((*other_ways, "sort_exactly(batch"), 0.0)
    rest = warps * code.issued(trips, never, feature)
    sort = 0.0
    for size in (2**i for i in range(1, team.bit_length())):
        masks = [size - 1, *(2**i for i in reversed(range(size.bit_length() - 2)))]
        for at, mask in enumerate(masks):
            other = "shuffle_xor(k[" if mask >= 32 else ("exchange[", "across<" if at else "across<true>")
            shares = {other: 0.0}
            if mask < 32:
                shares["Team<kWarps>::barrier();", "across<"] = 0.0
            sort += warps * code.issued({steps: 0}, shares, steps if at else sizes)
    # Loads, stores and sums of a block's eight features.
    block = teams * warps * code.issued(trips | {feature: 0}, never)
    return {"sort": sort, "rest": rest + block / 8, "all": sort + rest + block / 8, "repairs": passes}


def repairs(batch: int, features: int = 200) -> float:
    """Passes over a column until what its short keys left is right: the mean of normally distributed ones."""
    x = torch.randn(features, batch, generator=torch.Generator().manual_seed(0))
    bits = x.view(torch.int32).long()
    upper = torch.where(bits < 0, ~bits, bits | 1 << 31) & 0xFFFFFFFF
    key = (upper & ~(SORTS[batch] * 256 - 1)) | torch.arange(batch)
    x = x.gather(1, key.argsort(1))
    passes = 0
    while wrong := int((x[:, 1:] < x[:, :-1]).any(1).sum()):
        passes += wrong
        for odd in (1, 0):
            pairs = x[:, odd : odd + (batch - odd) // 2 * 2]
            pairs.copy_(pairs.unflatten(1, (-1, 2)).sort(2).values.flatten(1))
    return passes / features


def count(kernels: Kernels, device: Any) -> dict[str, Any]:
    """All that the tables are made of."""
    return {
        "architecture": "sm_90",
        "compiler": compiler(),
        "tucker2": tucker2(kernels, device),
        "fused_chunk": chunk_of_the_fused_form(kernels),
        "diversity": [
            {"batch": batch, **found, "us": microseconds(found["all"] * FEATURES)}
            for batch in SORTS
            for found in [diversity_sort(kernels, batch)]
        ],
    }


def tucker2_table(rows: list[dict[str, Any]]) -> str:
    """Microseconds and warp instructions by shape."""

    def cells(form: str, write: Callable[[dict[str, Any]], str]) -> list[str]:
        return [write(row[form]) if form in row else "" for row in rows]

    lines = [
        ["bandwidth: x read once, y written once (us)", *(f"{row['bandwidth_us']:.1f}" for row in rows)],
        ["fused: blocks", *cells("fused", lambda f: f"{f['blocks']:,}")],
        ["fused: warp instructions a block", *cells("fused", lambda f: f"{f['issued']:,.0f}")],
        ["fused: issue limit (us)", *cells("fused", lambda f: f"{f['us']:.0f}")],
        ["persistent: tiles, and how many at once",
         *cells("persistent", lambda f: f"{f['tiles']:,} by {f['blocks']}")],
        ["persistent: warp instructions a tile", *cells("persistent", lambda f: f"{f['issued']:,.0f}")],
        ["persistent: issue limit (us)", *cells("persistent", lambda f: f"{f['us']:.1f}")],
    ]  # fmt: skip
    return markdown_table(["", *(row["shape"] for row in rows)], lines)


def diversity_table(rows: list[dict[str, Any]]) -> str:
    """Warp instructions a feature by batch size, and the issue limit."""
    lines = [
        [f"{row['batch']:,}", *(f"{row[part]:,.0f}" for part in ("sort", "rest", "all")), f"{row['us']:.0f}"]
        for row in rows
    ]
    return markdown_table(["batch", "the sort", "loads, sums, stores", "all", "issue limit (us)"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--disassemblies", type=Path, help="folder of <source>.sass, made by nvdisasm -c -gi")
    given = parser.parse_args().disassemblies
    sys.path.append(str(ROOT / "tests"))
    from cuda_emulator import Emulator, compile_emulator

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [
            (given / f"{source}.sass").read_text() if given else disassembly(source, folder)
            for source in SOURCES
        ]
        built = os.environ.get("KEGFAST_EMULATOR")
        kernels, device = Kernels(*texts), Emulator(Path(built) if built else compile_emulator(folder))
        write_json(RESULTS / "cuda_counts.json", count(kernels, device))


if __name__ == "__main__":
    main()
