"""compress(): a trained network in low-rank layers, by measurement never slower than before."""

from kegfast.compression.compress import compress
from kegfast.compression.report import CompressionReport, LayerReport
from kegfast.compression.surgery import densify

__all__ = ["CompressionReport", "LayerReport", "compress", "densify"]
