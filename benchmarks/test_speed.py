"""`pytest benchmarks --benchmark-only`: single layers and a whole network by pytest-benchmark."""

import pytest
import torch

from benchmarks.bench_models import inference, networks
from benchmarks.bench_tucker2 import contenders
from benchmarks.tucker2_shapes import Shape

LAYERS = {
    "LeNet": Shape("lenet", 20, 50, 14, (10, 25), kernel=5, padding=0),
    "CIFAR": Shape("cifar", 64, 64, 32, (16, 16)),
    "ResNet": Shape("resnet", 256, 256, 14, (64, 64)),
    "ResNet, stride 2": Shape("resnet", 128, 256, 28, (32, 64), stride=2),
}


@pytest.mark.parametrize("name", ["kegfast", "sequential", "prepacked", "dense"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(benchmark, layer: str, batch: int, name: str) -> None:
    benchmark.group = f"{layer}, batch {batch}"
    with torch.no_grad():
        call = contenders(LAYERS[layer], batch, torch.float32)[f"{name} channels_last"]
        assert benchmark(call).shape[0] == batch


@pytest.mark.parametrize("kind", ["kegfast", "sequential", "dense"])
def test_resnet18(benchmark, kind: str) -> None:
    benchmark.group = "ResNet-18, batch 1"
    call = inference(networks("ResNet-18", torch.channels_last)[kind], torch.randn(1, 3, 224, 224))
    assert benchmark(call).shape == (1, 1000)
