"""ONNX Runtime and OpenVINO on a model: calls that do nothing but run it.

Both read one ONNX file of the model, where a factored layer is three convolutions, and use as many threads
as torch. ONNX Runtime finds its inputs and outputs bound; OpenVINO plans for latency, in float32.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

Call = Callable[[], object]


def runtimes(model: nn.Module, x: Tensor) -> dict[str, Call]:
    """A call of each runtime, verified against the model; raises ImportError where one is not installed."""
    import onnxruntime
    import openvino

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model.eval(), (x,), path, dynamo=False, input_names=["x"], output_names=["y"])
        data = path.read_bytes()
    images = np.ascontiguousarray(x.numpy())
    with torch.no_grad():
        wanted = model(x).numpy()

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    bound = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in (images, np.empty_like(wanted))]
    binding.bind_ortvalue_input("x", bound[0])
    binding.bind_ortvalue_output("y", bound[1])
    session.run_with_iobinding(binding)
    _verify("ONNX Runtime", bound[1].numpy(), wanted)

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(data), "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(images, shared_memory=True))
    request.infer()
    _verify("OpenVINO", request.get_output_tensor().data, wanted)
    return {"onnxruntime": lambda: session.run_with_iobinding(binding), "openvino": request.infer}


def _verify(name: str, got: np.ndarray, wanted: np.ndarray) -> None:
    error = np.abs(got - wanted).max() / np.abs(wanted).max()
    if not error < 1e-3:
        raise AssertionError(f"{name} answers otherwise: {error:.2g} of the largest number")
