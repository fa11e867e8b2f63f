"""Training and accuracy on real digits, small."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from kegfast.data import load
from kegfast.models import MLP
from kegfast.training import evaluate, gather, loop, random_shift, train, warmup_cosine


@pytest.fixture(scope="module")
def digits():
    """The bundled digits, averaged over 4x4 pixels: enough to learn from, and quick."""
    splits = load("digits")
    return [TensorDataset(nn.functional.avg_pool2d(part.tensors[0], 4), part.tensors[1]) for part in splits]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), MLP(64, 10, units=32, depth=1, dropout=0.1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "sgd"},
        {"optimizer": lambda p: torch.optim.SGD(p, 0.05)},
        {"amp": True},
        {"shift": 1},
    ],
)
def test_training_learns(digits, options):
    model = network()
    before = evaluate(model, digits[2])
    history = train(
        model, digits[0], epochs=12, batch_size=32, lr=0.05 if "optimizer" in options else 0.01, **options
    )
    assert before < 30
    assert evaluate(model, digits[2]) > 90
    assert history[-1]["step"] == 12 * (1257 // 32)
    assert history[0].keys() == {"step", "loss", "lr"}
    assert history[-1]["lr"] < 1e-3 * history[10]["lr"]


def test_an_interrupted_training_ends_the_same(digits, tmp_path, monkeypatch):
    options = {"steps": 60, "shift": 1, "seed": 5}
    whole = network()
    history = train(whole, digits[0], **options)

    class Stop(Exception):
        pass

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    model = network()
    calls = iter(range(60))

    def crash(module, args):
        if next(calls) == 37:
            raise Stop

    hook = model.register_forward_pre_hook(crash)
    with pytest.raises(Stop):
        train(model, digits[0], checkpoint=tmp_path / "c.pt", **options)
    hook.remove()
    other = network()
    nn.init.zeros_(other[1].output.weight)  # what it started from no longer matters
    assert train(other, digits[0], checkpoint=tmp_path / "c.pt", resume=True, **options) == history
    for name, tensor in whole.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_every_epoch_visits_every_sample_once():
    seen = []

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 2)

        def forward(self, x):
            seen.append(x.flatten())
            return self.layer(x)

    data = TensorDataset(torch.arange(12.0)[:, None], torch.arange(12) % 2)
    train(Recorder(), data, epochs=3, batch_size=4)
    epochs = torch.cat(seen).view(3, 12)
    assert all(torch.equal(epoch.sort().values, torch.arange(12.0)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_accuracy_is_exact_and_leaves_the_model_as_it_was(digits):
    model = network()
    model[1].eval()
    model.train()
    model[1].hidden.eval()
    modes = [module.training for module in model.modules()]
    samples, labels = digits[1].tensors
    with torch.no_grad():
        expected = 100 * (model.eval()(samples).argmax(1) == labels).double().mean().item()
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    assert evaluate(model, digits[1], batch_size=7) == pytest.approx(expected)
    assert evaluate(model, DataLoader(digits[1], batch_size=50)) == pytest.approx(expected)
    assert evaluate(model, Subset(digits[1], range(180))) == pytest.approx(expected)
    assert [module.training for module in model.modules()] == modes


def test_augment_changes_what_the_model_sees(digits):
    plain, other = network(), network()
    options = {"steps": 5, "batch_size": 32, "seed": 2}
    turned = TensorDataset(digits[0].tensors[0].flip(-1), digits[0].tensors[1])
    train(plain, turned, **options)
    train(other, digits[0], augment=lambda x: x.flip(-1), **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_random_shift_moves_images_and_repeats_edges(seeded):
    x = torch.arange(200 * 2 * 5 * 4.0).view(200, 2, 5, 4)
    moved = random_shift(x, 1)
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    seen = set()
    for before, after in zip(padded, moved, strict=True):
        found = [
            (i, j) for i in range(3) for j in range(3) if torch.equal(before[:, i : i + 5, j : j + 4], after)
        ]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) == 9
    assert torch.equal(random_shift(x, 0), x)


def test_schedule_rises_then_falls_to_zero():
    factor = warmup_cosine(100)
    values = [factor(i) for i in range(101)]
    assert values[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.99973229])
    assert all(a > b for a, b in pairwise(values[4:]))
    assert values[100] == pytest.approx(0, abs=1e-12)
    assert warmup_cosine(1)(0) == 1


class Pairs(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i):
        return torch.full((2,), float(i)), i


def test_gather_reads_any_map_style_dataset():
    x, labels = gather(Pairs(), torch.tensor([2, 0]))
    assert torch.equal(x, torch.tensor([[2.0, 2.0], [0.0, 0.0]]))
    assert labels.tolist() == [2, 0]


def dataset(labels, shape=(3,)) -> TensorDataset:
    return TensorDataset(torch.ones(len(labels), *shape), torch.tensor(labels))


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (dataset([0, 1]), {}, ValueError, "steps or epochs"),
        (dataset([0, 1]), {"steps": 1, "epochs": 1}, ValueError, "steps or epochs"),
        (dataset([0, 1]), {"steps": 0}, ValueError, "steps must be a positive int, got 0"),
        (dataset([0, 1]), {"steps": 1, "batch_size": 0}, ValueError, "batch_size"),
        (dataset([0, 1]), {"steps": 1, "optimizer": "lbfgs"}, ValueError, "optimizer"),
        (dataset([0, 1]), {"steps": 1, "lr": -1.0}, ValueError, "lr must be a finite number above 0"),
        (dataset([0, 1]), {"steps": 1, "shift": -1}, ValueError, "shift"),
        (dataset([0, 1]), {"steps": 1, "weight_decay": -1.0}, ValueError, "weight_decay"),
        (dataset([0, 1]), {"steps": 1, "label_smoothing": 7}, ValueError, "label_smoothing"),
        (dataset([0, 1]), {"epochs": float("inf")}, ValueError, "epochs"),
        (dataset([0, 1]), {"steps": 1, "shift": 2}, ValueError, "images"),
        (dataset([0, 2]), {"steps": 1}, ValueError, "labels must be 0 to 1, as the logits, got 2"),
        (dataset([0, -1]), {"steps": 1}, ValueError, "got -1"),
        (dataset([0.0, 1.0]), {"steps": 1}, TypeError, "integers"),
        (TensorDataset(torch.ones(2, 3)), {"steps": 1}, TypeError, "pairs"),
        (TensorDataset(torch.ones(0, 3), torch.ones(0)), {"steps": 1}, ValueError, "one sample or more"),
        (dataset([0, 1], (4, 3)), {"steps": 1}, ValueError, "logits"),
        (dataset([0] * 9 + [2]), {"steps": 5, "batch_size": 2}, ValueError, "labels must be 0 to 1"),
        (dataset([[0], [1]]), {"steps": 1}, ValueError, r"labels must be of shape \(N,\)"),
        (dataset([True, False]), {"steps": 1}, TypeError, "labels must be integers"),
        ([(torch.ones(3), "cat")] * 4, {"steps": 1}, TypeError, "dataset must be pairs"),
        (None, {"steps": 1}, TypeError, "dataset must be"),
        (DataLoader(dataset([0, 1])), {"steps": 1}, TypeError, "dataset must be"),
        (dataset([0, 1]), {"steps": 1.5}, TypeError, "steps must be a positive int"),
        (dataset([0, 1]), {"steps": 1, "batch_size": True}, TypeError, "batch_size"),
        (dataset([0, 1]), {"steps": 1, "lr": "fast"}, TypeError, "lr must be a finite number above 0"),
        (dataset([0, 1]), {"steps": 1, "augment": 3}, TypeError, "augment must be"),
        (dataset([0, 1]), {"steps": 1, "device": "abacus"}, ValueError, "device must be"),
        (dataset([0, 1]), {"steps": 1, "seed": 0.5}, TypeError, "seed must be an int"),
        (dataset([0, 1]), {"steps": 1, "log_every": 0}, ValueError, "log_every must be"),
        (dataset([0, 1]), {"steps": 1, "checkpoint": 3}, TypeError, "checkpoint must be"),
    ],
)
def test_train_refuses_what_does_not_fit(data, options, error, message):
    with pytest.raises(error, match=message):
        train(nn.Linear(3, 2), data, **options)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(4, 2), "must be what the model takes, got a float32 tensor"),
        (nn.Linear(3, 2).double(), "must be what the model takes"),
        (Pair(3, 2), "a map to logits .*, got a tuple of a float32 tensor"),
        ("linear", "model must be a torch.nn.Module"),
    ],
)
def test_models_that_do_not_fit_are_refused(model, message):
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(model, dataset([0, 1]))
    with pytest.raises((ValueError, TypeError), match=message):
        train(model, dataset([0, 1]), steps=1)


def test_evaluate_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="got 5"):
        evaluate(nn.Linear(3, 2), dataset([0, 5]))
    with pytest.raises(ValueError, match="one sample"):
        evaluate(nn.Linear(3, 2), [])
    with pytest.raises(ValueError, match="model must be a map to numbers, got 'NaN"):
        evaluate(nn.Linear(3, 2), TensorDataset(torch.tensor([[0.0, math.nan, 0.0]]), torch.tensor([0])))
    with pytest.raises(TypeError, match="dataset must be pairs"):
        evaluate(nn.Linear(3, 2), DataLoader([(torch.ones(3), "cat")]))


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="model must be a model with parameters to train"):
        train(nn.Linear(3, 2).requires_grad_(False), dataset([0, 1]), steps=1)


def test_labels_may_be_narrow_integers():
    model = nn.Linear(3, 2)
    narrow = TensorDataset(torch.ones(2, 3), torch.tensor([1, 1], dtype=torch.int32))
    train(model, narrow, steps=50, lr=0.1)
    assert evaluate(model, narrow) == 100.0


def test_divergence_is_an_error_with_advice(digits):
    with pytest.raises(FloatingPointError, match=r"loss is .* lower learning rate"):
        train(network(), digits[0], steps=60, optimizer="sgd", lr=1e30)
