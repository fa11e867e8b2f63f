"""Compressed models leave torch's eager mode: export, ONNX, compile."""

import copy
import shutil
import zipfile
from dataclasses import dataclass

import pytest
import torch
from needs import needs_native
from torch import nn

from kegfast import compress, densify, fuse
from kegfast.compression import export_onnx, unfuse
from kegfast.models import ResNet14
from kegfast.nn import TuckerConv2d, TuckerLinear
from kegfast.nn.build import FactorChain

X = torch.linspace(-1, 1, 2 * 32 * 32).reshape(2, 1, 32, 32)


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return compress(ResNet14().eval(), 0.4, include="layers[23].*")[0]


@needs_native
def test_torch_export_keeps_the_operator(student):
    program = torch.export.export(student, (X,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("kegfast.tucker2" in target for target in targets) == 8
    torch.testing.assert_close(program.module()(X), student(X))


def test_compile_has_no_graph_break(student):
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), student(X))


def test_onnx_is_three_convolutions_and_agrees(student, tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "student.onnx"
    for model in (student, fuse(student)):
        export_onnx(model, path, X)
        kinds = [node.op_type for node in onnx.load(path).graph.node]
        assert kinds.count("Conv") == 5 + 3 * 8
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for batch in (2, 3):
            x = torch.randn(batch, 1, 32, 32)
            (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            expected = model(x).detach()
            assert (torch.from_numpy(found) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def test_onnx_of_several_inputs(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model = nn.Bilinear(4, 3, 2)
    inputs = torch.randn(2, 4), torch.randn(2, 3)
    export_onnx(model, tmp_path / "m.onnx", inputs)
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        inputs = torch.randn(batch, 4), torch.randn(batch, 3)
        feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
        torch.testing.assert_close(torch.from_numpy(session.run(None, feeds)[0]), model(*inputs))
    with pytest.raises(TypeError, match="example_input must be a tensor"):
        export_onnx(model, tmp_path / "m.onnx", ())


def test_what_changes_its_argument_says_so_and_can_leave_it():
    layer = TuckerConv2d(3, 4, 3, (2, 2))
    for change in (unfuse, densify):
        for given in (nn.Sequential(copy.deepcopy(layer)), copy.deepcopy(layer)):
            kinds = [type(m) for m in given.modules()]
            changed = change(given, inplace=False)
            assert [type(m) for m in given.modules()] == kinds
            assert not any(isinstance(m, TuckerConv2d) for m in changed.modules())
        model = nn.Sequential(copy.deepcopy(layer))
        assert change(model) is model
        assert not isinstance(model[0], TuckerConv2d)
        with pytest.raises(TypeError, match=r"^inplace must be True or False"):
            change(model, inplace="no")


def test_unfuse_is_plain_layers(student):
    plain = unfuse(student, inplace=False)
    assert not any(isinstance(module, TuckerConv2d) for module in plain.modules())
    assert sum(isinstance(module, FactorChain) for module in plain.modules()) == 8
    assert plain.state_dict().keys() == student.state_dict().keys()
    torch.testing.assert_close(plain(X), student(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda student: student, fuse])
def test_compile_of_the_whole_student_runs_as_one_graph(make, student):
    whole = make(student)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(whole, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), whole(X))
    assert len(graphs) == 1


@needs_native
@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.timeout(600)
def test_aot_inductor_keeps_the_operator(tmp_path):
    """A package that runs without the model's code; the fused operator is called from it."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    student, _ = compress(model, {"0": (2, 3), "3": (4, None)})
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        program = torch.export.export(student, (x,))
        package = aoti_compile_and_package(program, package_path=str(tmp_path / "student.pt2"))
        found = aoti_load_package(package)(x)
        torch.testing.assert_close(found, student(x), rtol=1e-4, atol=1e-5)
    with zipfile.ZipFile(package) as archive:
        code = b"".join(archive.read(name) for name in archive.namelist() if name.endswith((".cpp", ".json")))
    assert b"kegfast" in code


@dataclass
class Answer:
    """What a model of a user's returns."""

    logits: torch.Tensor
    extra: dict[str, torch.Tensor]


class Named(nn.Module):
    """Two inputs by keyword alone, outputs by name."""

    def __init__(self, dataclass_output):
        super().__init__()
        self.conv, self.fc, self.dataclass_output = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), dataclass_output

    def forward(self, *, pixels, scale=None):
        features = self.conv(pixels).mean((2, 3))
        parts = {"logits": self.fc(features), "extra": {"features": features * scale}}
        return Answer(**parts) if self.dataclass_output else parts


@pytest.mark.parametrize("dataclass_output", [False, True])
@torch.no_grad()
def test_onnx_keeps_the_names_of_outputs_and_takes_inputs_by_keyword(dataclass_output, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = Named(dataclass_output).eval()
    student, _ = compress(model, {"conv": (2, 3)})
    inputs = {"pixels": torch.randn(2, 3, 8, 8), "scale": torch.randn(2, 4)}
    export_onnx(torch.nn.DataParallel(student), tmp_path / "named.onnx", inputs)
    session = onnxruntime.InferenceSession(str(tmp_path / "named.onnx"))
    assert [output.name for output in session.get_outputs()] == ["logits", "extra.features"]
    assert {given.name for given in session.get_inputs()} == {"pixels", "scale"}
    more = {"pixels": torch.randn(5, 3, 8, 8), "scale": torch.randn(5, 4)}
    logits, features = session.run(None, {name: tensor.numpy() for name, tensor in more.items()})
    wanted = student(**more)
    extra = wanted.extra if dataclass_output else wanted["extra"]
    torch.testing.assert_close(torch.from_numpy(features), extra["features"], rtol=1e-4, atol=1e-5)
    wanted = wanted.logits if dataclass_output else wanted["logits"]
    torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_torchs_own_onnx_export_takes_a_model_as_it_is(dynamo, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        TuckerConv2d(16, 8, 3, (6, 5), padding=1, activation="relu"),
        nn.Flatten(),
        TuckerLinear(8 * 16, 5, (4, 3)),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    for model in (student, fuse(student)):
        with torch.no_grad():
            want = [model(x) for _ in range(3)][-1]  # repeated calls pass by the dispatcher
            torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=dynamo, verbose=False)
        kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
        assert kinds.count("Conv") == 4
        session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), want, rtol=1e-4, atol=1e-5)
