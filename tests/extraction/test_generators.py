"""Generators as a source: shapes, determinism, files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from kegfast._util.files import read_tensors, save_tensors
from kegfast.extraction import Generators

SHAPES = [(1, 32, 32), (3, 28, 20), (2, 5, 7), (6,), (4, 9)]


def generators(shape, copies=3, **options) -> Generators:
    torch.manual_seed(0)
    return Generators(copies, 4, shape, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_sample_shapes(shape, n):
    samples, labels = generators(shape).sample(n)
    assert samples.shape == (n, *shape)
    assert samples.dtype == torch.float32
    assert labels.shape == (n,)
    assert labels.dtype == torch.int64
    assert 0 <= labels.min() <= labels.max() < 4
    assert not samples.requires_grad


def test_sample_follows_the_global_seed():
    source = generators((1, 8, 8))
    torch.manual_seed(1)
    a = source.sample(20)
    torch.manual_seed(1)
    b = source.sample(20)
    c = source.sample(20)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(b[0], c[0])


def test_labels_belong_to_their_samples():
    source = generators((6,), copies=2)
    torch.manual_seed(1)
    samples, labels = source.sample(40)
    torch.manual_seed(1)
    asked = torch.randint(4, (2, 20))
    made = source.generate(asked, torch.randn(2, 20, 10))
    for sample, label in zip(samples, labels, strict=True):
        match = (made.flatten(0, 1) == sample).all(1).nonzero().flatten()
        assert label in asked.flatten()[match]


def test_all_classes_and_generators_are_drawn():
    source = generators((6,), copies=4)
    torch.manual_seed(0)
    samples, labels = source.sample(400)
    assert labels.bincount(minlength=4).min() > 60
    assert len(samples.unique(dim=0)) == 400


def test_chunks_do_not_change_the_samples(monkeypatch):
    source = generators((1, 8, 8))
    labels, noise = torch.randint(4, (3, 11)), torch.randn(3, 11, 10)
    whole = source.generate(labels, noise)
    monkeypatch.setattr("kegfast.extraction.generators.CHUNK", 4)
    torch.testing.assert_close(source.generate(labels, noise), whole)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape, tmp_path):
    options = {"input_range": (-1.0, [2.0] * shape[0])} if len(shape) == 3 else {"noise_size": 3}
    source = generators(shape, **options)
    source.network.train()
    labels = torch.randint(4, (3, 8))
    noise = torch.randn(3, 8, source.noise_size)
    source.generate(labels, noise)
    source.save(tmp_path / "generators.safetensors")
    loaded = Generators.load(tmp_path / "generators.safetensors")
    assert torch.equal(source.generate(labels, noise), loaded.generate(labels, noise))
    assert loaded.sample_shape == shape
    assert len(loaded) == 3


def test_load_refuses_foreign_and_broken_files(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match=r"kegfast\.generators"):
        Generators.load(foreign)
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors")
    with pytest.raises(ValueError, match="safetensors"):
        Generators.load(text)
    with pytest.raises(FileNotFoundError):
        Generators.load(tmp_path / "missing.safetensors")
    source = generators((6,))
    next(source.network.parameters()).data.fill_(float("nan"))
    source.save(tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="finite"):
        Generators.load(tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"copies": 10**9},
        {"copies": 0},
        {"sample_shape": [3, 10**6, 10**6]},
        {"noise_size": "ten"},
        {"labels": [1]},
        {"input_range": [1.0]},
        {"width": 3},
    ],
    ids=str,
)
def test_load_refuses_a_configuration_that_is_not_the_files(tmp_path, change):
    path = tmp_path / "g.safetensors"
    generators((3, 8, 8)).save(path)
    tensors, metadata = read_tensors(path)
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | change)
    save_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=r"g\.safetensors: expected parameters that fit"):
        Generators.load(path)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 3, (3, 8, 8)), "copies"),
        ((1, 1, (3, 8, 8)), "num_classes"),
        ((1, 3, 5), "sample_shape"),
        ((1, 3, (3, -8, 8)), "sample_shape"),
        ((1, 3, (3, 8, 8), 0), "noise_size"),
        ((1, 3, (3, 8, 8), 10, (1.0, 0.0)), "input_range"),
        ((1, 3, (8,), 10, (0.0, 1.0)), "input_range"),
        ((1, 3, (8,), 10, None, "hard"), "labels"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises((ValueError, TypeError), match=f"^{name} must be"):
        Generators(*arguments)


@pytest.mark.parametrize(
    ("labels", "noise", "name"),
    [
        (torch.full((2, 5), 4), torch.zeros(2, 5, 10), "labels"),
        (torch.full((2, 5), -1), torch.zeros(2, 5, 10), "labels"),
        (torch.zeros(3, 5, dtype=int), torch.zeros(2, 5, 10), "labels"),
        ("cat", torch.zeros(2, 5, 10), "labels"),
        (torch.zeros(2, 5, dtype=int), torch.zeros(2, 5, 9), "noise"),
        (torch.zeros(2, 5, dtype=int), torch.zeros(2), "noise"),
        (torch.zeros(2, 5, dtype=int), None, "noise"),
    ],
)
def test_generate_names_what_does_not_fit(labels, noise, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        generators((6,), copies=2).generate(labels, noise)


@pytest.mark.parametrize("n", [0, -3, 2.5, "4", True])
def test_sample_refuses_other_counts(n):
    with pytest.raises((ValueError, TypeError), match="n must be"):
        generators((6,)).sample(n)
