"""compress(): a trained network in low-rank layers, by measurement never slower than before."""

from kegfast.compression.export import export_onnx, unfuse
from kegfast.compression.folding import fuse
from kegfast.compression.interop import from_state_dict
from kegfast.compression.pipeline import compress
from kegfast.compression.report import CompressionReport, LayerReport
from kegfast.compression.saving import load, save
from kegfast.compression.surgery import densify

__all__ = [
    "CompressionReport",
    "LayerReport",
    "compress",
    "densify",
    "export_onnx",
    "from_state_dict",
    "fuse",
    "load",
    "save",
    "unfuse",
]
