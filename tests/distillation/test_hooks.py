"""Inner outputs taken by path."""

import pytest
import torch
from torch import nn

from kegfast.distillation import Features


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))


def test_outputs_are_those_of_the_named_modules():
    net, x = model(), torch.randn(5, 3)
    with Features(net, ["0", "1.0", ""]) as features:
        answer = net(x)
        assert torch.equal(features["0"], net[0](x))
        assert features["1.0"].requires_grad
        assert torch.equal(features[""], answer)
        assert features.taken().keys() == {"0", "1.0", ""}


def test_hooks_are_gone_afterwards():
    net = model()
    with Features(net, ["0"]):
        assert net[0]._forward_hooks
    assert not net[0]._forward_hooks


def test_an_unknown_path_names_its_neighbors():
    with pytest.raises(ValueError, match=r"^layer must be .*near: .*1\.0"):
        Features(model(), ["1.O"])


def test_other_arguments_are_named():
    with pytest.raises(TypeError, match=r"^model must be"):
        Features("net", ["0"])
    with pytest.raises(TypeError, match=r"^paths must be"):
        Features(model(), "0")


def test_a_module_that_did_not_run_is_named():
    with Features(model(), ["1.0"]) as features, pytest.raises(RuntimeError, match=r"1\.0"):
        features["1.0"]


def test_an_output_that_is_no_tensor_is_refused():
    net = nn.Sequential(nn.LSTM(3, 4))
    with Features(net, ["0"]), pytest.raises(TypeError, match=r"the output of '0'"):
        net(torch.randn(2, 3))


def test_the_outputs_of_an_earlier_pass_are_not_given_again():
    net, x = model(), torch.randn(5, 3)
    with Features(net, ["0"]) as features:
        net(x)
        features.taken()
        with pytest.raises(RuntimeError, match="'0' did not run"):
            features.taken()


@pytest.mark.parametrize("whole", [True, False])
def test_hooks_run_in_what_was_compiled_before(whole):
    net, x = model(), torch.randn(5, 3)
    if whole:
        net = torch.compile(net, backend="aot_eager")
    else:
        net[1].compile(backend="aot_eager")
    net(x)
    with Features(net, ["1.0"]) as features:
        net(x)
        assert features["1.0"].shape == (5, 4)
    net(x)
    assert not features._outputs
