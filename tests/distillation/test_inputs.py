"""Models of several inputs: tuples and dicts wherever samples come from."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import kegfast
from kegfast.distillation import Augmented, Ensemble, InMemory, Mixture, Noisy, Pool, as_source


class Two(nn.Module):
    """Classes of a pair of vectors, the second of whole numbers."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.linear = nn.Embedding(5, 6), nn.Linear(3, 6)
        self.last = nn.Linear(6, 4)

    def forward(self, values: Tensor, words: Tensor) -> Tensor:
        return self.last((self.linear(values) + self.embedding(words).sum(1)).relu())


VALUES = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
WORDS = torch.randint(5, (300, 2), generator=torch.Generator().manual_seed(1))
NAMED = {"words": WORDS, "values": VALUES}
ITEMS = [{"words": WORDS[i], "values": VALUES[i], "labels": i % 4} for i in range(300)]
PAIRS = [((VALUES[i], WORDS[i]), i % 4) for i in range(300)]
SOURCES = {
    "tuple": (VALUES, WORDS),
    "dict": NAMED,
    "dict with labels": {**NAMED, "label": torch.arange(300) % 4},
    "in memory": InMemory((VALUES, WORDS), torch.arange(300) % 4),
    "data set": ITEMS,
    "data set of pairs": PAIRS,
    "loader": DataLoader(ITEMS, batch_size=7),
    "loader of pairs": DataLoader(PAIRS, batch_size=64),
    "pool": Pool(ITEMS, 200),
    "noisy": Noisy(NAMED, 0.01),
    "augmented": Augmented(NAMED, lambda x: {**x, "values": x["values"] * 1.01}),
    "mixture": Mixture([NAMED, DataLoader(ITEMS, batch_size=7)]),
}


def agreement(student: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        return (student(**NAMED).argmax(1) == teacher(**NAMED).argmax(1)).float().mean().item()


@pytest.mark.parametrize("name", SOURCES)
def test_a_student_of_two_inputs_learns(name):
    teacher, student = Two(1), Two(2)
    kegfast.distill(student, teacher, SOURCES[name], steps=250, batch_size=32, lr=2e-2)
    assert agreement(student, teacher) > 0.85


def test_several_teachers_and_features_of_two_inputs():
    teacher, student = Two(1), Two(2)
    kegfast.distill(
        student, [teacher, teacher], NAMED, loss="soft_target+hint@linear=models.0.linear", steps=3
    )
    assert torch.equal(Ensemble([teacher])(VALUES, WORDS).argmax(1), teacher(VALUES, WORDS).argmax(1))


@pytest.mark.parametrize(
    "name", ["dict with labels", "in memory", "data set", "loader of pairs", "pool", "mixture"]
)
def test_labels_come_with_their_samples(name):
    torch.manual_seed(0)
    samples, labels = as_source(SOURCES[name]).sample(20)
    values = samples["values"] if isinstance(samples, dict) else samples[0]
    places = (values[:, None] == VALUES).all(2).float().argmax(1)
    known = labels >= 0
    assert known.any()
    assert torch.equal(labels[known], places[known] % 4)


def test_boundary_samples_want_one_tensor():
    with pytest.raises(TypeError, match=r"^batch must be of one tensor of samples.*got a dict of 'words'"):
        kegfast.distill(Two(2), Two(1), NAMED, loss="boundary", steps=1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((VALUES, WORDS[:4]), "^samples must be tensors of as many samples each"),
        ({"values": VALUES}, "^source must be what the teacher takes, got a dict of 'values'"),
        (VALUES, "^source must be what the teacher takes"),
        ({}, "^source must be a tensor, or a tuple or a dict of tensors"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(source, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kegfast.distill(Two(2), Two(1), source, steps=1)
