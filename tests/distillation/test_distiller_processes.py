"""The loop in two processes."""

from pathlib import Path

import torch
import torch.distributed
import two_processes
from small_models import convolutional
from torch.nn.parallel import DistributedDataParallel

import kegfast


class ByRank:
    """The rank's own part of a batch, the same at every step."""

    def __init__(self, batch, ranks):
        self.parts = batch.chunk(ranks)

    def sample(self, n):
        part = self.parts[torch.distributed.get_rank()]
        return part[:n], None


def _in_process(rank: int, folder: Path) -> None:
    teacher, student = convolutional(6, seed=1).eval(), convolutional(4)
    batch = torch.load(folder / "batch.pt")
    kegfast.distill(DistributedDataParallel(student), teacher, ByRank(batch, 2), batch_size=8, **DISTRIBUTED)
    torch.save(student.state_dict(), folder / f"{rank}.pt")


# Neither term mixes the samples of a batch, so that two halves give the gradient of the whole.
DISTRIBUTED = {
    "loss": "soft_target+hint@3",
    "steps": 3,
    "optimizer": "sgd",
    "student_batchnorm": "eval",
}


def test_two_processes_train_one_student(tmp_path: Path):
    torch.manual_seed(0)
    batch = torch.randn(16, 1, 9, 9)
    torch.save(batch, tmp_path / "batch.pt")
    two_processes.run(_in_process, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    class Whole:
        def sample(self, n):
            return batch[:n], None

    teacher, student = convolutional(6, seed=1).eval(), convolutional(4)
    kegfast.distill(student, teacher, Whole(), batch_size=16, **DISTRIBUTED)
    for name, tensor in student.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


class HalfLabelled:
    """The first rank's labels are the teacher's, the second's are wrong: it has no base sample."""

    def __init__(self, batch, teacher):
        with torch.no_grad():
            right = teacher(batch).argmax(dim=1)
        self.batch, self.labels = batch, (right + torch.distributed.get_rank()) % 3

    def sample(self, n):
        return self.batch[:n], self.labels[:n]


def _boundary_in_process(rank: int, folder: Path) -> None:
    teacher = convolutional(6, seed=1).eval()
    student = convolutional(6, seed=1)  # agrees with the teacher: every sample it is given is a base sample
    start = student[6].weight.detach().clone()
    source = HalfLabelled(torch.randn(16, 1, 9, 9), teacher)
    parallel = DistributedDataParallel(student)
    history = kegfast.distill(
        parallel, teacher, source, loss="soft_target+boundary:1", steps=3, batch_size=16, log_every=1
    )
    result = {"losses": [entry["boundary"] for entry in history], "moved": student[6].weight - start}
    torch.save(result | {"weights": dict(student.named_parameters())}, folder / f"{rank}.pt")


def test_boundary_samples_of_one_process_alone_hold_nobody_up(tmp_path: Path):
    two_processes.run(_boundary_in_process, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert any(first["losses"])
    assert not any(second["losses"])
    assert first["moved"].abs().max() > 0
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
