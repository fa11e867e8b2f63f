import pytest
import torch

from kegfast import compression
from kegfast.experiments.paper import PAPERS
from kegfast.experiments.tails import head_outputs, tail

SHARING = [experiment for experiment in PAPERS.values() if experiment.shared]


def teacher_of(experiment):
    """One whose BatchNorms are not the identity."""
    torch.manual_seed(0)
    model = experiment.build()
    channels = model.conv1.in_channels
    for _ in range(3):
        model(torch.rand(8, channels, 32, 32))
    return model.eval(), torch.rand(5, channels, 32, 32)


@pytest.mark.parametrize("experiment", SHARING, ids=lambda experiment: experiment.dataset)
@torch.no_grad()
def test_a_tail_goes_on_where_the_shared_layers_end(experiment):
    model, samples = teacher_of(experiment)
    wanted = model(samples)
    seen = head_outputs(model, experiment.shared, samples, batch_size=2)
    torch.testing.assert_close(tail(model, experiment.shared)(seen), wanted)
    torch.testing.assert_close(model(samples), wanted)
    assert seen.shape == (5, 32, 16, 16)


@pytest.mark.parametrize("experiment", SHARING, ids=lambda experiment: experiment.dataset)
def test_students_of_the_paper_share_the_layers_that_they_are_said_to(experiment):
    model, samples = teacher_of(experiment)
    for student in experiment.students.values():
        compressed = compression.compress(model, dict(student.ranks))[0].eval()
        seen = [head_outputs(net, experiment.shared, samples) for net in (model, compressed)]
        assert torch.equal(*seen)


def test_a_tail_is_taught_with_its_models_own_parameters():
    model, samples = teacher_of(PAPERS["fashion-mnist"])
    shared = PAPERS["fashion-mnist"].shared
    part = tail(model, shared)
    assert {id(p) for p in part.parameters()} < {id(p) for p in model.parameters()}
    part.train()(head_outputs(model, shared, samples)).square().sum().backward()
    taught = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert taught == {"layers3", "linear"}
    assert not model.layers1.training


def test_nothing_is_left_behind_where_a_model_fails():
    model, _ = teacher_of(PAPERS["fashion-mnist"])
    with pytest.raises(RuntimeError):
        head_outputs(model, ("conv1",), torch.rand(2, 7, 32, 32))
    assert not model.conv1._forward_hooks
