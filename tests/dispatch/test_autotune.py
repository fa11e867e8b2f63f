

def test_autotune_takes_inputs_by_keyword(tmp_path, monkeypatch):
    monkeypatch.setenv("KEGFAST_CACHE", str(tmp_path))

    class Keywords(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = TuckerConv2d(8, 8, 3, (4, 4))

        def forward(self, *, pixels, count):
            return self.layer(pixels) * count

    inputs = {"pixels": torch.randn(1, 8, 9, 9), "count": 2}
    assert len(kegfast.autotune(Keywords(), inputs)) == 1
    with pytest.raises(TypeError, match="example_input must be"):
        kegfast.autotune(Keywords(), {"pixels": torch.ones(1, dtype=torch.int64)})
