"""Files of compressed models: the same outputs back, and nothing executed."""

import copy
import json
import resource
from pathlib import Path

import pytest
import torch
from odd import Odd, odd
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from kegfast import compress, densify, fuse, load, save
from kegfast._util.files import read_tensors, save_tensors
from kegfast.compression.structure import graph_from
from kegfast.models import MLP, LeNet5, ResNet14

X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
RANKS = {"stem": (2, 9), "block.0.0": (5, 6), "shared": (8, None), "pointwise": (8, None), "fc": (4, 4)}


class Branching(nn.Module):
    """A forward pass that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)

    def forward(self, x):
        return self.conv(x) if float(x.sum()) > 0 else -self.conv(x)


@pytest.mark.parametrize("make", [lambda m: m, fuse, densify])
def test_a_model_comes_back_without_its_code(tmp_path, make):
    student, _ = compress(odd(), RANKS)
    student = make(student)
    save(student, tmp_path / "odd.safetensors")
    loaded = load(tmp_path / "odd.safetensors")
    assert not isinstance(loaded, Odd)
    assert not loaded.training
    torch.testing.assert_close(loaded(X), student.eval()(X), rtol=0, atol=0)
    assert loaded.state_dict().keys() == student.state_dict().keys()
    adapted = load(tmp_path / "odd.safetensors", Odd())
    torch.testing.assert_close(adapted(X), student(X), rtol=0, atol=0)
    assert adapted.shared is adapted.alias
    by_path = load(tmp_path / "odd.safetensors", factory="odd:Odd")
    torch.testing.assert_close(by_path(X), student(X), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (LeNet5(), torch.randn(2, 1, 32, 32)),
        (ResNet14(3, 7), torch.randn(2, 3, 32, 32)),
        (MLP(9, 7), torch.randn(3, 9)),
    ],
)
def test_own_models(tmp_path, model, x):
    student, report = compress(model.eval(), 0.3)
    save(student, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    torch.testing.assert_close(loaded(x), student(x))
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    assert {n: tuple(r) for n, r in json.loads(metadata["ranks"]).items()} == report.ranks
    assert metadata["torch"] == str(torch.__version__)


class Heads(nn.Module):
    """Two inputs, a recurrent layer in between, and outputs by name."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(24, 16), nn.Linear(12, 16)
        self.recurrent, self.head = recurrent, nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        sequence, _ = self.recurrent((self.left(x) + self.right(y))[:, None].expand(-1, 3, -1))
        return {"last": self.head(sequence[:, -1]), "all": sequence}


RECURRENT = {
    "lstm": lambda: nn.LSTM(16, 8, num_layers=2, batch_first=True, bias=False),
    "projected": lambda: nn.LSTM(16, 11, proj_size=8, batch_first=True),
    "gru": lambda: nn.GRU(16, 4, batch_first=True, bidirectional=True),
    "relu": lambda: nn.RNN(16, 8, nonlinearity="relu", batch_first=True),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_outputs_by_name_and_recurrent_layers(tmp_path, kind):
    torch.manual_seed(0)
    student, report = compress(Heads(RECURRENT[kind]()), {"left": (4, None), "head": (2, None)})
    assert len(report.ranks) == 2
    save(student, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    inputs = torch.randn(2, 24), torch.randn(2, 12)
    torch.testing.assert_close(loaded(*inputs), student.eval()(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "rank", "shape"),
    [
        (nn.Conv2d(6, 8, 3, padding=1), (3, 4), (2, 6, 5, 5)),
        (nn.Conv2d(6, 8, 3, padding=1), (None, 4), (2, 6, 5, 5)),
        (nn.Linear(12, 8), (3, None), (2, 12)),
    ],
)
def test_a_layer_by_itself(tmp_path, layer, rank, shape):
    student, _ = compress(layer, {"": rank})
    save(student, tmp_path / "m.safetensors")
    loaded, x = load(tmp_path / "m.safetensors"), torch.randn(shape)
    torch.testing.assert_close(loaded(x), student(x), rtol=0, atol=0)


def test_what_cannot_be_rebuilt_needs_its_architecture(tmp_path):
    """A TransformerEncoder is one node of the graph, but keeps no arguments that would make it again."""

    def make():
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return nn.Sequential(encoder, nn.Flatten(), nn.Linear(48, 12)).eval()

    student, _ = compress(make(), {"2": (3, None)})
    save(student, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="model or factory must be given"):
        load(tmp_path / "m.safetensors")
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(load(tmp_path / "m.safetensors", make())(x), student(x), rtol=0, atol=0)


def test_dtype_and_further_training(tmp_path):
    student, _ = compress(ResNet14().to(torch.bfloat16), 0.3)
    save(student, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in loaded.parameters())
    loaded(torch.randn(2, 1, 32, 32).bfloat16()).sum().backward()
    assert all(p.grad is not None for p in copy.copy(list(loaded.parameters())))


def test_models_that_cannot_be_traced_need_their_architecture(tmp_path):
    student, _ = compress(Branching(), {"conv": (2, 3)})
    save(student, tmp_path / "m.safetensors", factory="some.package:make")
    with pytest.raises(ValueError, match=r"some\.package:make"):
        load(tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", factory=Branching)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(loaded(x), student.eval()(x), rtol=0, atol=0)


def test_broken_and_foreign_files(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="safetensors"):
        load(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"kegfast\.save"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.safetensors")
    student, _ = compress(LeNet5(), 0.3)
    save(student, path)
    with pytest.raises(ValueError, match="fits"):
        load(path, ResNet14())
    with pytest.raises(ValueError, match="factory must be one that makes"):
        load(path, factory=dict)
    student.fc2.core.weight.data[0] = float("nan")
    save(student, path)
    with pytest.raises(ValueError, match=r"finite.*fc2"):
        load(path)
    with pytest.raises(ValueError, match="factory"):
        save(student, path, factory="no path")
    with pytest.raises(TypeError, match="model must be"):
        save({"a": 1}, path)


LARGER = '"in_features": 84, "out_features": 10', '"in_features": 84000, "out_features": 2000'
DEEPER = "{", "[" * 100_000


@pytest.mark.parametrize("change", [LARGER, DEEPER])
def test_structures_that_are_not_the_files_take_no_memory(tmp_path, change):
    save(LeNet5(), tmp_path / "m.safetensors")
    with_structure(tmp_path / "m.safetensors", *change)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"m\.safetensors: expected"):
        load(tmp_path / "m.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # kilobytes


def with_structure(path: Path, old: str, new: str) -> None:
    """The file with another text in its structure."""
    tensors, metadata = read_tensors(path)
    assert old in metadata["structure"]
    save_tensors(path, tensors, metadata | {"structure": metadata["structure"].replace(old, new, 1)})


def test_billions_of_layers_are_refused(tmp_path):
    save(nn.LSTM(3, 4), tmp_path / "m.safetensors")
    with_structure(tmp_path / "m.safetensors", '"num_layers": 1', '"num_layers": 1000000000')
    with pytest.raises(ValueError, match="at most 1000 layers"):
        load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("hint", ["kegfast.training.processes:place", "kegfast.cli:main", "os:getcwd"])
def test_no_function_is_called_because_a_file_asks_for_it(tmp_path, hint):
    save(Branching(), tmp_path / "m.safetensors", factory=hint)
    with pytest.raises(ValueError, match="this file cannot be traced"):
        load(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "node",
    [
        {"op": "call_function", "name": "a", "target": "os.system", "args": {"tuple": ["true"]}},
        {"op": "call_function", "name": "a", "target": "torch.load", "args": {"tuple": ["x"]}},
        {"op": "call_function", "name": "a", "target": "getattr", "args": {"tuple": ["", "__class__"]}},
        {"op": "call_method", "name": "a", "target": "__reduce__"},
        {"op": "call_module", "name": "a", "target": 'x"), print("hi'},
        {"op": "placeholder", "name": "x): print()\n#", "target": "x"},
        {"op": "output", "name": "output", "target": "output", "kwargs": {"a=print()": 1}},
        {"op": "call_function", "name": "a", "target": "torch.add", "args": {"tuple": [{"node": "later"}]}},
    ],
)
def test_graphs_run_only_what_is_listed(node):
    with pytest.raises(ValueError, match=r"structure must (be|hold)"):
        graph_from([node], nn.Module())


@pytest.mark.parametrize("spec", [{"type": "Module_"}, {"type": "functional"}, {"type": "init"}, 3, {}])
def test_specs_build_only_modules(spec):
    from kegfast.compression.structure import module_from

    with pytest.raises(ValueError, match="structure"):
        module_from(spec)
