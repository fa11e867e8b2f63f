"""extract from the command line."""

import torch
from cli_support import TRAIN, last_line, run

import kegfast
from kegfast._util.files import read_tensors


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


def test_soft_labels_and_a_faithful_teacher(home, capsys):
    assert run(TRAIN) == 0
    options = "--model nets:Net --weights a/model.safetensors --recipe paper --steps 4 --batch-size 8"
    assert run(f"extract --data mine.npz {options} --labels soft --faithful --generators 2 --out g") == 0
    assert kegfast.Generators.load(home / "g/generators.safetensors").labels == "soft"
    capsys.readouterr()
    options = options.replace("paper", "kegfast")
    assert run(f"extract --data mine.npz {options} --faithful --out h") == 2
    assert "faithful must be False" in last_line(capsys)
