"""The core stands on torch, numpy and safetensors: the rest is imported where it is used, and named."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kegfast
from kegfast._util.extras import MissingExtra, extra
from kegfast.nn import TuckerConv2d

EXTRAS = ("tensorly", "scipy", "sklearn", "matplotlib", "PIL", "rich", "onnx", "onnxscript", "onnxruntime")
BLOCKED = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r})); "


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_other_package():
    code = (
        "import sys, torch; before = set(sys.modules); import kegfast; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    allowed = {"kegfast", "numpy", "packaging", "safetensors", "torch", "_remote_module_non_scriptable"}
    assert set(fresh(code).split()) <= allowed


def test_import_leaves_torch_counter_alone():
    assert fresh("import sys, kegfast; print('torch.utils.flop_counter' in sys.modules)") == "False\n"


@pytest.mark.parametrize("first", ["kegfast", "torch.utils.flop_counter"])
def test_counter_knows_operators_whichever_is_imported_first(first):
    code = f"""
import {first}
import kegfast, torch
from torch.utils.flop_counter import FlopCounterMode
layer = kegfast.nn.TuckerConv2d(8, 8, 3, (4, 4), padding=1)
with FlopCounterMode(display=False) as counter, torch.no_grad():
    layer(torch.randn(1, 8, 5, 5))
print(counter.get_total_flops())
"""
    layer, x = TuckerConv2d(8, 8, 3, (4, 4), padding=1), torch.randn(1, 8, 5, 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), kegfast.backend("reference"):
        layer(x)
    assert int(fresh(code)) == counter.get_total_flops() > 0


def test_layer_and_loss_run_without_any_extra():
    code = f"""{BLOCKED}
import kegfast, torch
x = torch.randn(2, 8, 5, 5, requires_grad=True)
loss = kegfast.nn.TuckerConv2d(8, 8, 3, (4, 4), padding=1)(x).square().mean()
loss = loss + kegfast.nn.DiversityLoss()(torch.randn(6, 3), torch.randn(6, 4, requires_grad=True))
loss.backward()
print(bool(x.grad.isfinite().all()))
"""
    assert fresh(code) == "True\n"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("kegfast.compress(torch.nn.Sequential(torch.nn.Linear(64, 64)))", "compress"),
        ("kegfast.data.load('digits')", "data"),
        ("kegfast.compression.export_onnx(torch.nn.ReLU(), 'm.onnx', torch.ones(1, 1))", "onnx"),
        ("import kegfast._util.html", "report"),
    ],
)
def test_missing_extra_is_named_by_the_call_that_needs_it(call, name):
    code = f"""{BLOCKED}
import kegfast, torch
try:
    {call}
except ImportError as error:
    print(error)
"""
    assert f"pip install 'kegfast[{name}]'" in fresh(code)


def test_missing_extra_is_one_line_of_the_command_line():
    code = f"{BLOCKED}from kegfast.cli import main; sys.exit(main(['demo', '--out', 'nowhere']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "kegfast demo: rich is not installed; get it by: pip install 'kegfast[cli]'\n"


def test_other_missing_modules_keep_their_error():
    with pytest.raises(ModuleNotFoundError) as raised, extra("cli"):
        import kegfast.nothing_of_this_name  # noqa: F401
    assert not isinstance(raised.value, MissingExtra)
