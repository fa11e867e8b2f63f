"""Data sets: read from the published formats, split in the same way everywhere."""

import gzip
import hashlib
import pickle
import struct
from dataclasses import replace
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from scipy.io import savemat

from kegfast.data import NAMES, describe, load
from kegfast.data.catalog import ENTRIES

rng = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, train: int = 5_020, test: int = 20):
    """A folder of random images in MNIST's format."""
    folder.mkdir(parents=True)
    arrays = {}
    for part, n in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        arrays[part] = images, labels
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images), 1))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return arrays


def fingerprint(splits) -> str:
    digest = hashlib.sha256()
    for part in splits:
        for tensor in part.tensors:
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def check(splits, sizes):
    assert [len(part) for part in splits] == sizes
    info = splits.info
    for part in splits:
        samples, labels = part.tensors
        assert part.info is info
        assert samples.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert samples.shape[1:] == info.sample_shape
        assert samples.isfinite().all()
        assert 0 <= labels.min() <= labels.max() < info.num_classes
    samples = splits.train.tensors[0]
    assert abs(samples.mean()) < 0.01
    assert abs(samples.std() - 1) < 0.1


def test_digits():
    splits = load("digits")
    check(splits, [1257, 180, 360])
    assert splits.info.num_classes == 10
    assert torch.cat([part.tensors[1] for part in splits]).bincount().tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    assert fingerprint(load("digits")) == fingerprint(splits)


@pytest.mark.parametrize(
    ("name", "sizes", "classes"),
    [
        ("mnist", [55_000, 5_000, 10_000], 10),
        ("fashion-mnist", [55_000, 5_000, 10_000], 10),
        ("pendigits", [6_745, 749, 3_498], 10),
        ("letter", [14_000, 2_000, 4_000], 26),
        ("shuttle", [39_150, 4_350, 14_500], 7),
    ],
)
def test_published_sets(data_root, name, sizes, classes):
    splits = load(name, data_root)
    check(splits, sizes)
    assert splits.info.num_classes == classes
    assert len(splits.test.tensors[1].unique()) == classes


def test_letter_is_split_as_in_the_paper(data_root):
    rows = np.loadtxt(data_root / "uci/letter/letter_R.dat", skiprows=1)
    order = np.arange(20_000)
    np.random.RandomState(2019).shuffle(order)
    expected = rows[order[16_000:]]
    samples, labels = load("letter", data_root).test.tensors
    assert torch.equal(samples, torch.tensor(expected[:, 1:-1], dtype=torch.float32))
    assert torch.equal(labels, torch.tensor(expected[:, -1], dtype=torch.int64))


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_images_are_resized_as_pillow_does_and_normalized(tmp_path, compressed):
    arrays = write_idx(tmp_path / "mnist")
    if not compressed:
        for path in (tmp_path / "mnist").iterdir():
            path.write_bytes(gzip.decompress(path.read_bytes()))
    splits = load("mnist", tmp_path)
    assert [len(part) for part in splits] == [20, 5_000, 20]
    for part, source in ((splits.train, "train"), (splits.test, "t10k")):
        images, labels = (array[:20] for array in arrays[source])
        pillow = np.stack([Image.fromarray(i).resize((32, 32), Image.Resampling.BILINEAR) for i in images])
        expected = (torch.tensor(pillow).double()[:, None] / 255 - 0.1307) / 0.3081
        torch.testing.assert_close(part.tensors[0].double(), expected, rtol=0, atol=1e-6)
        assert part.tensors[1].tolist() == labels.tolist()


def test_svhn_mat_files(tmp_path):
    (tmp_path / "svhn").mkdir()
    images = rng.integers(0, 256, (32, 32, 3, 5_010), dtype=np.uint8)
    labels = (np.arange(5_010) % 10 + 1).reshape(-1, 1)  # 10 stands for the digit 0
    savemat(tmp_path / "svhn/train_32x32.mat", {"X": images, "y": labels})
    savemat(tmp_path / "svhn/test_32x32.mat", {"X": images[..., :30], "y": labels[:30]})
    splits = load("svhn", tmp_path)
    assert [len(part) for part in splits] == [10, 5_000, 30]
    samples, found = splits.test.tensors
    assert found[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    info = splits.info
    for channel in range(3):
        value = (images[4, 7, channel, 12] / 255 - info.mean[channel]) / info.std[channel]
        assert samples[12, channel, 4, 7].item() == pytest.approx(value, abs=1e-5)


def fake_openml(monkeypatch, data, target):
    asked = []

    def fetch(name, **options):
        asked.append(name)
        return SimpleNamespace(data=data, target=target)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    return asked


def test_openml_images_equal_the_files(tmp_path, monkeypatch):
    arrays = write_idx(tmp_path / "mnist")
    entry = ENTRIES["mnist"]
    monkeypatch.setitem(ENTRIES, "mnist", replace(entry, openml=(entry.openml[0], 5_020)))
    data = np.concatenate([images.reshape(-1, 784) for images, _ in arrays.values()])
    target = np.concatenate([labels for _, labels in arrays.values()]).astype(str).astype(object)
    asked = fake_openml(monkeypatch, data, target)
    assert fingerprint(load("mnist")) == fingerprint(load("mnist", tmp_path))
    assert asked == ["mnist_784"]


def test_openml_tables_are_standardized_by_part(monkeypatch):
    data = rng.normal(3.0, 5.0, (10_992, 16))
    target = rng.integers(0, 10, 10_992).astype(str).astype(object)
    fake_openml(monkeypatch, data, target)
    splits = load("pendigits")
    check(splits, [6_745, 749, 3_498])
    samples, labels = splits.test.tensors
    expected = (data[7_494:] - data[7_494:].mean(0)) / data[7_494:].std(0, ddof=1)
    np.testing.assert_allclose(samples.numpy(), expected, atol=1e-5)
    assert labels.tolist() == target[7_494:].astype(int).tolist()


def test_offline_without_files_says_where_to_put_them(tmp_path, monkeypatch):
    def fetch(name, **options):
        raise URLError("no route")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    for name, entry in ENTRIES.items():
        with pytest.raises(FileNotFoundError, match=f"{entry.files[0]}.*<root>/{entry.folder}"):
            load(name)
        with pytest.raises(FileNotFoundError, match=f"{entry.files[0]}.*<root>/{entry.folder}"):
            load(name, tmp_path)


def test_describe_needs_no_files(tmp_path):
    assert describe("digits") is load("digits").info
    assert [describe(name).num_classes for name in NAMES] == [10, 10, 10, 10, 10, 26, 7]
    np.savez(tmp_path / "mine.npz", **own())
    assert describe(tmp_path / "mine.npz").sample_shape == (2, 5)
    with pytest.raises(ValueError, match="got 'cifar'"):
        describe("cifar")


def test_input_range_is_that_of_black_and_white():
    low, high = describe("svhn").input_range
    assert low == pytest.approx([-0.4378 / 0.1980, -0.4439 / 0.2011, -0.4729 / 0.1971])
    assert high == pytest.approx([0.5622 / 0.1980, 0.5561 / 0.2011, 0.5271 / 0.1971])
    assert describe("letter").input_range is None


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"fashion-mnist.*got 'cifar'"):
        load("cifar")
    assert NAMES == ("digits", "mnist", "fashion-mnist", "svhn", "pendigits", "letter", "shuttle")


@pytest.mark.filterwarnings("ignore:loadtxt")
def test_damaged_files_are_named(tmp_path):
    folder = tmp_path / "mnist"
    write_idx(folder)
    images = folder / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for content in (
        b"",
        b"text",
        whole[: len(whole) // 2],
        gzip.compress(idx(np.ones((3, 2), np.uint8))[:-1]),
        gzip.compress(idx(np.ones((3, 2), np.uint8)) + bytes(1 << 28), 1),  # a quarter of a gigabyte
        gzip.compress(b"\0\0\x08\x03" + b"\x7f\xff\xff\xff" * 3),
    ):
        images.write_bytes(content)
        with pytest.raises(ValueError, match="train-images"):
            load("mnist", tmp_path)
    (tmp_path / "uci/letter").mkdir(parents=True)
    wrong = ("1\t2\tnan", "1\tinf\t0", "1\t2\t0.5", "1\t2\t1e30", "1\t1e300\t0")
    texts = "", "header\n", "a\tb\tc\n1\tx\t0\n", "a\tb\n1\t2\n", *(f"a\tb\tc\n{line}\n" for line in wrong)
    for text in texts:
        (tmp_path / "uci/letter/letter_R.dat").write_text(text)
        with pytest.raises(ValueError, match="letter_R"):
            load("letter", tmp_path)
    (tmp_path / "svhn").mkdir()
    (tmp_path / "svhn/train_32x32.mat").write_bytes(b"no matlab file at all" * 20)
    with pytest.raises(ValueError, match="train_32x32"):
        load("svhn", tmp_path)


def own(n: int = 40, **changes):
    arrays = {"samples": rng.normal(size=(n, 2, 5)).astype(np.float32), "labels": np.arange(n) % 3}
    return arrays | changes


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_own_data_is_split(tmp_path, suffix):
    path, arrays = tmp_path / f"mine{suffix}", own()
    np.savez(path, **arrays) if suffix == ".npz" else save_file(arrays, path)
    splits = load(path)
    assert [len(part) for part in splits] == [28, 4, 8]
    assert (splits.info.name, splits.info.num_classes, splits.info.sample_shape) == ("mine", 3, (2, 5))
    rows = torch.cat([part.tensors[0] for part in splits]).flatten(1)
    torch.testing.assert_close(rows[rows[:, 0].argsort()], torch.tensor(arrays["samples"]).flatten(1)[
        torch.tensor(arrays["samples"]).flatten(1)[:, 0].argsort()])  # fmt: skip


def test_own_test_set_is_kept(tmp_path):
    arrays = own(test_samples=np.ones((3, 2, 5)), test_labels=np.array([2, 1, 0]))
    np.savez(tmp_path / "mine.npz", **arrays)
    splits = load(str(tmp_path / "mine.npz"))
    assert [len(part) for part in splits] == [36, 4, 3]
    assert splits.test.tensors[1].tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.zeros(40, int)}, "num_classes must be 2 or more, got 1"),
        ({"samples": np.zeros((0, 2), "f4"), "labels": np.zeros(0, int)}, "samples must be"),
        ({"samples": np.full((40, 2), np.nan, "f4")}, "samples must be finite"),
        ({"samples": np.zeros((40, 2), np.uint8)}, "floating and normalized"),
        ({"labels": np.zeros(40)}, "labels must be integers"),
        ({"labels": np.arange(40) - 1}, "got -1"),
        ({"labels": np.full(40, 2**64 - 1, np.uint64)}, "labels must be below 40"),
        ({"labels": np.arange(40) * 10**15}, "labels must be below 40"),
        ({"samples": np.float32(1), "labels": np.int64(1)}, "samples must be"),
        ({"samples": np.full((40, 2), 1e300)}, "samples must be finite"),
        ({"labels": np.arange(39) % 3}, "labels must be"),
        ({"test_samples": np.ones((3, 2, 4)), "test_labels": np.arange(3)}, "samples must be"),
        ({"test_samples": np.ones((3, 2, 5)), "test_labels": np.arange(3) + 1}, "got 3"),
        ({"test_samples": np.ones((3, 2, 5))}, "test_labels must be one of the arrays"),
    ],
)
def test_own_data_that_does_not_fit_is_refused(tmp_path, changes, message):
    np.savez(tmp_path / "mine.npz", **own(**changes))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "mine.npz")


def test_own_data_is_never_executed(tmp_path):
    np.savez(tmp_path / "a.npz", samples=np.array([{}], dtype=object), labels=np.zeros(1, int))
    (tmp_path / "b.npz").write_bytes(pickle.dumps({"samples": 1}))
    (tmp_path / "c.npz").write_bytes(b"text")
    (tmp_path / "d.safetensors").write_bytes(b"text")
    for name in ("a.npz", "b.npz", "c.npz", "d.safetensors"):
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.npz")
