"""Reading and writing files: atomically, and without ever executing what they contain."""

import json
import os
import secrets
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from errno import EINVAL
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kegfast._util.check import expected

WRAPPERS = ("model_state", "model_state_dict", "state_dict", "model", "net", "ema")
"""Keys under which training scripts keep the state dict inside a larger checkpoint, the first known first."""
PREFIXES = ("module.", "model.")
"""What DataParallel and averages put before every name, and a LightningModule that has the model so named."""

UNTRACKED = "num_batches_tracked"
"""BatchNorm's counter of batches, which weights from before torch 0.4.1 do not have; torch then sets it."""


def as_path(argument: str, path: str | Path) -> Path:
    """The path of a file; a number, which `open` would take for an open file, is a TypeError."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(expected(argument, "the path of a file", path))
    return Path(path)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path that becomes `path` only when the block ends without an error.

    Args:
        path: the file to write; missing parent folders are made.

    Yields:
        A path in the same folder, which does not exist yet. A reader therefore sees the old file or the
        whole new one, and a failure (a full disk, Ctrl-C) leaves the old one and nothing else.

    Raises:
        OSError: the file cannot be written.
        ValueError: `path` is a folder or a device, which a file must not take the place of.
    """
    path = as_path("path", path).resolve()
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise ValueError(f"{path} must be a file, new or to be replaced, got {kind}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file, a folder in the way the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically; NaN and infinity are refused (JSON has none)."""
    text = json.dumps(obj, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes, path: str | Path) -> Any:
    """What a JSON text that stands in `path` says.

    Raises:
        ValueError: it is no JSON, or nested deeper than anything that was written here.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object, such as `write_json` wrote of a dict.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no JSON, or no object.
    """
    found = parse_json(as_path("path", path).read_bytes(), path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(found).__name__}")
    return found


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write named tensors as one safetensors file, atomically.

    Args:
        path: the file to write.
        tensors: any devices, layouts and sharing of memory; each is stored whole.
        metadata: strings kept in the file's header.
    """
    import safetensors.torch  # here, so that kernels run where nothing but torch is installed

    # Cloned: safetensors refuses tensors that share memory, as tied weights do.
    whole = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
    }
    # As bytes: the library's own writer hides the reason of an OSError.
    content = safetensors.torch.save(whole, dict(metadata) if metadata else None)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def save_checkpoint(path: str | Path, obj: Any) -> None:
    """Write `obj` with torch.save, atomically."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(obj, file)


def read_checkpoint(path: str | Path) -> Any:
    """Read what torch.save wrote, on the CPU, refusing any file that would execute code.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not such a file, or holds more than tensors and plain containers.
    """
    with open(as_path("path", path), "rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its remarks on pickle protocols: the error below says it
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # on foreign bytes the unpickler fails in any way
            if isinstance(error, OSError) and error.errno != EINVAL:  # a seek before the start of half a file
                raise
            raise ValueError(
                f"{path}: expected safetensors or a torch file of tensors and plain containers, "
                "got a file that is damaged, foreign or would execute code"
            ) from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors, on the CPU, and its metadata.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a safetensors file.
    """
    import safetensors

    with open(as_path("path", path), "rb"):
        pass  # the usual OSError, with its reason, before the library's own
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a model's weights from a file, without executing it.

    Args:
        path: a `.safetensors` file, a torch file of a plain state dict, or a checkpoint that keeps the
            state dict under one of `WRAPPERS`. What DataParallel, torch.compile and averaged models add to
            the names is dropped.

    Returns:
        Tensors on the CPU by name.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, foreign, or holds no state dict.
    """
    return bare_names(_read_state(path), None)


def _read_state(path: str | Path) -> dict[str, Tensor]:
    path = as_path("path", path)
    found = read_tensors(path)[0] if path.suffix == ".safetensors" else state_in(read_checkpoint(path))
    if not isinstance(found, Mapping) or not found or not all(map(_is_entry, found.items())):
        raise ValueError(f"{path}: expected a state dict (names and tensors), got {_summary(found)}")
    return dict(found)


def state_in(checkpoint: Any) -> Any:
    """The innermost mapping under `WRAPPERS`; the value itself where there is none."""
    while isinstance(checkpoint, Mapping):
        inner = (checkpoint[key] for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping))
        found = next(inner, None)
        if found is None:
            break
        checkpoint = found
    return checkpoint


def bare_names(state: Mapping[str, Tensor], own: Collection[str] | None) -> dict[str, Tensor]:
    """A state dict under the names that the model has without what was wrapped around it.

    Args:
        state: tensors by name.
        own: the model's names, which are never shortened; None where they are not known: `model.` then stays.
    """
    known = own or ()
    found = dict(state)
    if not any("_orig_mod." in name for name in known):
        found = {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items()}
    if "n_averaged" not in known and any(name.startswith("module.") for name in found):
        found.pop("n_averaged", None)
    for prefix in PREFIXES if own is not None else PREFIXES[:1]:
        foreign = not any(name.startswith(prefix) for name in known)
        while foreign and found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load weights into `model` strictly: every name, every shape, only finite values.

    The model is not touched unless everything fits.

    Args:
        model: any module.
        path: see `read_state_dict`.

    Returns:
        `model`.

    Raises:
        OSError: the file cannot be opened.
        TypeError: `model` is no module.
        ValueError: it holds no state dict, one of another architecture, or NaN or infinite values.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", model))
    own = model.state_dict()
    weights = bare_names(_read_state(path), own)
    shapes = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    problems = [
        _listing("missing", sorted(n for n in own.keys() - weights.keys() if not n.endswith(UNTRACKED))),
        _listing("unexpected", sorted(weights.keys() - own.keys())),
        _listing("wrong shape", shapes),
        _listing("not finite", [name for name, t in weights.items() if not bool(t.isfinite().all())]),
    ]
    if any(problems):
        found = "; ".join(filter(None, problems))
        raise ValueError(f"{path}: expected finite weights of {type(model).__name__}, got {found}")
    model.load_state_dict(weights)
    return model


def _is_entry(item: tuple[Any, Any]) -> bool:
    """A name, and a tensor with values: neither sparse nor without any."""
    name, tensor = item
    dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
    return isinstance(name, str) and dense


def digest(value: Any) -> bytes:
    """A hash of plain containers, numbers, text and tensors: equal only while all of them are."""
    found = blake2b(digest_size=16)
    _feed(found, value)
    return found.digest()


def _feed(found: blake2b, value: Any) -> None:
    if isinstance(value, Mapping):
        found.update(f"mapping {len(value)}".encode())
        for key, part in value.items():
            _feed(found, key)
            _feed(found, part)
    elif isinstance(value, list | tuple):
        found.update(f"sequence {len(value)}".encode())
        for part in value:
            _feed(found, part)
    elif isinstance(value, Tensor):
        found.update(f"{value.dtype} {tuple(value.shape)} {value.layout}".encode())
        if value.layout == torch.strided and not value.is_meta:
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    else:
        found.update(f"{type(value).__name__} {value!r};".encode())


def _summary(found: Any) -> str:
    if isinstance(found, Mapping):
        return _listing("a mapping with keys", [str(key) for key in found]) or "an empty mapping"
    return f"a {type(found).__name__}"


def _listing(title: str, names: list[str], shown: int = 3) -> str:
    """`title: a, b, c and 4 more`, or nothing for no names."""
    if not names:
        return ""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{title}: {', '.join(names[:shown])}{rest}"
