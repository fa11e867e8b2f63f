"""The forms of a Tucker-2 convolution: every name that a choice has, whoever makes it."""

from enum import StrEnum


class Form(StrEnum):
    """What runs a call. `kegfast.dispatch.tucker2.choose` says which."""

    PARTS = "parts"
    """The layer's three modules, as they are."""
    REFERENCE = "reference"
    """torch's three convolutions."""
    CONVOLUTIONS = "convolutions"
    """oneDNN's three convolutions on weights that it has reordered; in a table of CUDA, cuDNN's."""
    OPERATOR = "operator"
    """The compiled operator, which has its own choice of kernels."""
    TRAINING = "training"
    """The operator, with gradients."""
    DIRECT = "direct"
    """On the CPU, measured: the operator with the direct sum in its core."""
    WINOGRAD = "winograd"
    """On the CPU, measured: the operator with Winograd's."""
    FUSED = "fused"
    """On CUDA: the operator as one kernel."""
    STAGES = "stages"
    """On CUDA: the operator as one kernel a stage."""
    PERSISTENT = "persistent"
    """On CUDA, sm_90: one kernel whose blocks stay."""
