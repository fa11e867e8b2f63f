"""compress takes the inputs that models take: several, by keyword, unbatched, numbers of words."""

from dataclasses import dataclass

import pytest
import torch
from needs import needs_native
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kegfast import compress
from kegfast.nn import TuckerConv2d


@dataclass
class Answer:
    """An output that is no mapping and no sequence."""

    logits: torch.Tensor


class Pixels(nn.Module):
    """As transformers' image models: inputs by keyword alone, a structure as the output."""

    def __init__(self, make=dict):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.core, self.fc, self.make = nn.Conv2d(12, 12, 3), nn.Linear(12, 5), make

    def forward(self, *, pixel_values, gain=None):
        x = torch.relu(self.norm(input=self.conv(pixel_values)))
        x = self.core(x).mean((2, 3))
        return self.make(logits=self.fc(x if gain is None else x * gain))


class Two(nn.Module):
    """Images and rows."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.rows, self.fc = nn.Linear(7, 12), nn.Linear(12, 5)

    def forward(self, images, rows, scale=1.0):
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)) + self.rows(rows)) * scale


class Words(nn.Module):
    """Nothing among its inputs has a gradient."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.fc = nn.Embedding(20, 16), nn.Linear(16, 64), nn.Linear(64, 3)

    def forward(self, ids, mask):
        return self.fc(torch.relu(self.hidden(self.embedding(ids))).mul(mask[..., None]).mean(1))


IMAGES, ROWS, LABELS = torch.randn(40, 3, 8, 8), torch.randn(40, 7), torch.arange(40) % 5
IDS, MASK = torch.arange(240).reshape(40, 6) % 20, torch.ones(40, 6, dtype=torch.int64)
BATCHES = [{"pixel_values": x, "labels": y, "idx": y} for x, y in zip(IMAGES, LABELS, strict=True)]


class Source:
    """A source of inputs by keyword."""

    def sample(self, n):
        return {"pixel_values": torch.randn(n, 3, 8, 8)}, None


def pairs(*tensors):
    return DataLoader(TensorDataset(*tensors), batch_size=9)


CASES = {
    "mapping": (Pixels, {"pixel_values": IMAGES}, {"pixel_values": IMAGES[:2]}),
    "dataclass": (lambda: Pixels(Answer), {"pixel_values": IMAGES, "gain": torch.ones(40, 12)}, None),
    "batches of mappings": (Pixels, DataLoader(BATCHES, batch_size=9), {"pixel_values": IMAGES[:2]}),
    "data set of mappings": (Pixels, TensorDataset(IMAGES), None),
    "source of mappings": (Pixels, Source(), {"pixel_values": IMAGES[:2], "gain": None}),
    "tuple": (Two, (IMAGES, ROWS), (IMAGES[:2], ROWS[:2])),
    "batches of tuples": (Two, pairs(IMAGES, ROWS), (IMAGES[:2], ROWS[:2], 2.0)),
    "tuples with labels": (Two, pairs(IMAGES, ROWS, LABELS), None),
    "nested": (Two, [((IMAGES, ROWS), LABELS)], None),
    "words": (Words, (IDS, MASK), (IDS[:2], MASK[:2])),
    "words by name": (Words, {"ids": IDS, "mask": MASK}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_models_are_calibrated_on_what_they_take(case):
    torch.manual_seed(0)
    make, calibration, example = CASES[case]
    if case == "data set of mappings":
        calibration = _Items()
    if case == "nested":
        calibration = DataLoader(
            [(tuple(parts), y) for *parts, y in zip(IMAGES, ROWS, LABELS, strict=True)], 9
        )
    model = make().eval()
    _, report = compress(
        model,
        budget={"params": 0.6},
        calibration=calibration,
        example_input=example,
        samples=32,
        measure=False,
    )
    assert report.ratio > 1.5
    assert len(report.plans) > 1  # which means that outputs were compared
    assert len(set(report.plans.values())) > 1
    assert max(report.plans.values()) > 0
    assert any("on 32 inputs" in note for note in report.notes)
    assert all("on the inputs" in report[name].reason for name in report.ranks)


class _Items(torch.utils.data.Dataset):
    def __len__(self):
        return len(BATCHES)

    def __getitem__(self, index):
        return BATCHES[index]


def test_made_inputs_of_several_tensors_are_matched_to_the_norms():
    torch.manual_seed(0)
    model = Two().eval()
    model.norm.running_mean.fill_(2.0)
    _, report = compress(model, budget={"params": 0.6}, calibration=(IMAGES, ROWS), samples=32)
    assert any("moved as synthetic inputs" in note for note in report.notes)


def test_outputs_that_hold_no_tensors_are_said_to_hold_none():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(7, 7)

        def forward(self, x):
            return str(float(self.fc(x).sum()))

    _, report = compress(Text(), budget={"params": 0.9}, calibration=ROWS)
    assert any("hold no tensors to compare plans by" in note for note in report.notes)


@torch.no_grad()
def test_unbatched_images_go_through_as_through_torchs_layers():
    torch.manual_seed(0)

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 12, 3), nn.Linear(12, 5)

        def forward(self, x):
            return self.fc(self.conv(x).mean((-2, -1)))

    model, x = Alone().eval(), torch.randn(3, 8, 8)
    student, report = compress(model, {"conv": (3, 12)}, example_input=x)
    assert type(student.conv) is TuckerConv2d or report["conv"].decision == "dense"
    student, _ = compress(model, {"conv": (3, 12)})
    assert type(student.conv) is TuckerConv2d
    torch.testing.assert_close(student(x), model(x), rtol=1e-4, atol=1e-5)
    assert compress(model, budget={"flops": 0.7}, example_input=x)[1].ranks


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            {"calibration": {"pixel_values": IMAGES[:, 0]}},
            ValueError,
            "calibration must be what the model takes",
        ),
        ({"calibration": {"labels": LABELS}}, ValueError, "calibration must be what the model takes"),
        ({"calibration": (IMAGES, "text")}, ValueError, "calibration must be what the model takes"),
        ({"calibration": {"pixel_values": IMAGES, "gain": IMAGES[:3]}}, ValueError, "as many samples each"),
        ({"example_input": {"pixels": IMAGES}}, ValueError, "example_input must be what the model takes"),
        ({"example_input": {1: IMAGES}}, TypeError, "example_input must be"),
    ],
)
def test_other_inputs_are_refused_by_name(wrong, error, message):
    with pytest.raises(error, match=message):
        compress(Pixels(), budget={"params": 0.6}, **wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": {"params": 0.6}, "example_input": {"pixel_values": IMAGES[:2]}},
        {"budget": {"params": 0.6}, "calibration": _Items()},
        pytest.param(  # of torch's own operators one is faster than three
            {"budget": {"latency": 0.9}, "example_input": {"pixel_values": IMAGES[:2]}}, marks=needs_native
        ),
        {"rank": 0.5, "calibration": Source(), "inplace": True},
    ],
)
def test_the_global_generator_stays_where_it_was(options):
    torch.manual_seed(0)
    model = Pixels().eval()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = compress(model, **options)[1].to_dict()["layers"]
    assert torch.equal(torch.get_rng_state(), before)
    assert first
