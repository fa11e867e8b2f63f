"""Students inside wrappers are saved bare, and checkpoints of wrapped models are read."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from kegfast import compress, load, load_weights, save
from kegfast.cli import main
from kegfast.compression import from_state_dict
from kegfast.nn import TuckerConv2d, TuckerLinear


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()


X = torch.randn(2, 3, 8, 8)


def distributed(model):
    """In a group of one process."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture
def no_group_left():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": distributed,
    "AveragedModel": AveragedModel,
    "compiled": torch.compile,
    "compiled in DataParallel": lambda model: nn.DataParallel(torch.compile(model)),
    "averaged DataParallel": lambda model: AveragedModel(nn.DataParallel(model)),
}


class Lightning(nn.Module):
    """Holds the model under a name of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model


@torch.no_grad()
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_student_is_saved_as_itself(wrapper, tmp_path, no_group_left):
    student, _ = compress(network(), {"0": (2, 4), "3": (6, None)})
    save(WRAPPERS[wrapper](student), tmp_path / "student.safetensors")
    for loaded in (
        load(tmp_path / "student.safetensors"),
        load(tmp_path / "student.safetensors", WRAPPERS[wrapper](network())),
    ):
        assert loaded.state_dict().keys() == student.state_dict().keys()
        torch.testing.assert_close(loaded(X), student(X))


KEYS = ("model_state", "model_state_dict", "state_dict", "model", "net", "ema")


@torch.no_grad()
@pytest.mark.parametrize("wrapper", [*WRAPPERS, "Lightning"])
def test_weights_of_wrapped_models_are_read(wrapper, tmp_path, no_group_left):
    wrap = {**WRAPPERS, "Lightning": Lightning}[wrapper]
    wanted, student = network(), compress(network(), {"0": (2, 4), "3": (None, 4)})[0]
    torch.save({"epoch": 3, "state_dict": wrap(wanted).state_dict()}, tmp_path / "checkpoint.pt")
    torch.manual_seed(1)
    fresh = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    torch.testing.assert_close(load_weights(fresh, tmp_path / "checkpoint.pt")(X), wanted(X))
    found = from_state_dict(network(), wrap(student).state_dict())
    torch.testing.assert_close(found(X), student(X))


@torch.no_grad()
@pytest.mark.parametrize("key", KEYS)
def test_the_usual_keys_of_checkpoints_are_known(key, tmp_path):
    wanted, student = network(), compress(network(), {"0": (2, 4)})[0]
    torch.save({"epoch": 3, "optimizer": {}, key: wanted.state_dict()}, tmp_path / "checkpoint.pt")
    torch.testing.assert_close(load_weights(network(), tmp_path / "checkpoint.pt")(X), wanted(X))
    found = from_state_dict(network(), {"epoch": 3, key: {"state_dict": student.state_dict()}})
    torch.testing.assert_close(found(X), student(X))


@torch.no_grad()
def test_names_that_are_the_models_own_stay(tmp_path):
    for attribute in ("model", "module"):
        own = nn.ModuleDict({attribute: network()})
        torch.save(own.state_dict(), tmp_path / "own.pt")
        load_weights(nn.ModuleDict({attribute: network()}), tmp_path / "own.pt")


class Parts(nn.Sequential):
    """Two layers in the place of one."""


@torch.no_grad()
@pytest.mark.parametrize("rank", [(None, 8), (6, None), (5, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_factored_on_one_side_are_read(rank, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10, bias=bias))
    student, _ = compress(model, {"0": rank})
    found = from_state_dict(model, student.state_dict())
    assert type(found[0]) is TuckerLinear
    assert found[0].rank == rank
    x = torch.randn(3, 12)
    torch.testing.assert_close(found(x), student(x))


@torch.no_grad()
@pytest.mark.parametrize("rank", [(None, 4), (2, None)])
@pytest.mark.parametrize("names", [("first", "core", "last"), ("0", "1")])
def test_convolutions_factored_on_one_side_are_read(rank, names):
    model = network()
    student, _ = compress(model, {"0": rank})
    state = student.state_dict()
    if names == ("0", "1"):
        inner = [name for name in ("first", "core", "last") if f"0.{name}.weight" in state]
        for old, new in zip(inner, names, strict=True):
            renamed = {key: key.replace(f"0.{old}.", f"0.{new}.", 1) for key in state}
            state = {renamed[key]: value for key, value in state.items()}
    found = from_state_dict(model, state)
    assert not isinstance(found[0], TuckerConv2d)
    torch.testing.assert_close(found(X), student(X))


def test_a_models_file_is_no_module(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(network().state_dict(), "weights.pt")
    for given, hint in (("mine.py:net", "mine:net"), ("nets/mine.py:net", "nets.mine:net")):
        assert main(["compress", "--model", given, "--weights", "weights.pt"]) == 2
        assert f"write {hint}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="write mine:net"):
        save(network(), "m.safetensors", factory="mine.py:net")
