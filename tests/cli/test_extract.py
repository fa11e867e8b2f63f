"""extract from the command line."""

import torch
from cli_support import TRAIN, run

import kegfast
from kegfast.files import read_tensors


def test_extract_writes_generators_that_load(home, capsys):
    assert run(TRAIN) == 0
    options = "--model nets:Net --weights a/model.safetensors --steps 12 --batch-size 16 --generators 2"
    assert run(f"extract --data mine.npz {options} --out g") == 0
    generators = kegfast.Generators.load(home / "g/generators.safetensors")
    assert len(generators) == 2
    assert generators.sample(5)[0].shape == (5, 6)
    # The same from the shape alone, without data.
    assert run(f"extract --sample-shape 6 --num-classes 3 {options} --out h") == 0
    g, h = (read_tensors(home / name / "generators.safetensors") for name in "gh")
    assert g[1] == h[1]
    assert all(torch.equal(g[0][name], h[0][name]) for name in g[0])
