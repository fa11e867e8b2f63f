"""What tests need that a machine or an installation may lack."""

import pytest

import kegfast

needs_native = pytest.mark.skipif(
    not kegfast.build_info()["native"], reason="kegfast's compiled part is not built"
)
