"""Atomic writing, and weights from files that nobody vouches for."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from kegfast._util.files import (
    atomic_write,
    digest,
    load_weights,
    read_json,
    read_state_dict,
    read_tensors,
    save_tensors,
    write_json,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def leftovers(folder: Path, *expected: str) -> list[str]:
    return sorted({path.name for path in folder.iterdir()} - set(expected))


def test_atomic_write_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for content in ("first", "second"):
        with atomic_write(path) as temporary:
            temporary.write_text(content)
            assert temporary.parent == path.parent
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == content
    assert leftovers(path.parent, "file.txt") == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_leaves_the_old_file_after_an_error(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert leftovers(tmp_path, "file.txt") == []


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"a": torch.ones(2)})
    # A limit on the size of files fails like a full disk does: in the middle of writing.
    script = f"""
import resource, torch
from kegfast._util.files import save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_tensors({str(path)!r}, {{"a": torch.ones(100_000)}})
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "File too large"
    assert read_tensors(path)[0]["a"].shape == (2,)
    assert leftovers(tmp_path, "weights.safetensors") == []


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a device or a pipe"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=kind), atomic_write(path) as temporary:
            temporary.write_text("new")
    assert (tmp_path / "pipe").is_fifo()


def test_write_json_refuses_what_json_cannot_hold(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}


def test_tensors_come_back_with_their_metadata_even_if_they_share_memory(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"a": base, "b": base.T, "c": base[1:], "d": torch.tensor(3, dtype=torch.int64)}
    save_tensors(tmp_path / "t.safetensors", tensors, {"kind": "test"})
    found, metadata = read_tensors(tmp_path / "t.safetensors")
    assert metadata == {"kind": "test"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("wrap", [lambda s: s, *(lambda s, k=k: {k: s, "epoch": 3} for k in
                                                 ("model_state", "state_dict", "model"))])  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_weights_unwraps_checkpoints(tmp_path, wrap, prefix):
    model = net()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(wrap(state), tmp_path / "w.pth")
    other = net()
    nn.init.zeros_(other[0].weight)
    assert load_weights(other, tmp_path / "w.pth") is other
    assert torch.equal(other[0].weight, model[0].weight)


def test_load_weights_from_safetensors(tmp_path):
    model = net()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    other = net()
    nn.init.zeros_(other[0].weight)
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), r"missing: 0\.bias"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected: extra"),
        (lambda s: s.update({"0.weight": torch.ones(4, 5)}), r"shape: 0\.weight \(4, 5\) instead"),
        (lambda s: s["0.weight"].view(-1)[5].fill_(float("nan")), r"not finite: 0\.weight"),
        (lambda s: s["1.running_var"].fill_(float("inf")), r"not finite: 1\.running_var"),
    ],
)  # fmt: skip
def test_load_weights_says_what_does_not_fit_and_changes_nothing(tmp_path, change, message):
    state = {name: tensor.clone() + 1 for name, tensor in net().state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "w.pth")
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Dangerous:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_files_are_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state": Dangerous()}, "zip.pth")
    Path("raw.pth").write_bytes(pickle.dumps(Dangerous(), protocol=2))
    for name in ("zip.pth", "raw.pth"):
        with pytest.raises(ValueError, match="would execute code"):
            read_state_dict(name)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.pth", b""),
        ("w.pth", b"some text"),
        ("w.pth", b"PK\x03\x04 a cut zip"),
        ("w.safetensors", b""),
        ("w.safetensors", b"some text that is long enough"),
        ("w.safetensors", (10**12).to_bytes(8, "little") + b"{}"),
    ],
)
def test_damaged_files_are_value_errors_that_name_the_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"[" * 200_000, b"1" * 9999]
)
def test_what_is_no_json_object_is_a_value_error_that_names_the_file(tmp_path, content):
    (tmp_path / "o.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"o\.json: expected"):
        read_json(tmp_path / "o.json")


def test_half_a_file_is_a_value_error_that_names_it(tmp_path):
    torch.save(net().state_dict(), tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        (tmp_path / "w.pth").write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"w\.pth"):
            read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize("path", [3, None, True])
def test_a_number_is_no_path(path):
    with pytest.raises(TypeError, match="path must be the path of a file"):
        read_state_dict(path)
    with pytest.raises(TypeError, match="path must be the path of a file"):
        save_tensors(path, {})


NO_STATE_DICTS = [
    [torch.ones(1)],
    {"a": 1},
    {},
    {"model_state": {}},
    torch.ones(2),
    {"a": torch.ones(2, device="meta")},
    {"a": torch.ones(2).to_sparse()},
]


@pytest.mark.parametrize("content", NO_STATE_DICTS)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: expected a state dict"):
        read_state_dict(tmp_path / "w.pth")


def test_a_digest_tells_apart_what_differs():
    values = [
        {"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": [1]}, {"a": True}, {"b": 1}, [{"a": 1}], [1, [2]], [[1], 2],
        torch.ones(4), torch.ones(2, 2), torch.ones(4).double(), torch.ones(4).bfloat16(), None,
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": [torch.ones(2, 3).T, 0.5]}) == digest({"a": (torch.ones(3, 2), 0.5)})


def test_weights_go_into_modules_alone(tmp_path):
    with pytest.raises(TypeError, match="model must be"):
        load_weights(5, tmp_path / "none.pth")


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
def test_a_missing_file_is_an_os_error(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        read_state_dict(tmp_path / name)
