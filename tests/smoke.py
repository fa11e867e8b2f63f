"""What an installed wheel must do on torch, numpy and safetensors alone; run outside the checkout.

`python smoke.py [--native]`: with it, the compiled part must be there.
"""

import sys
from pathlib import Path

import torch

import kegfast

assert Path(kegfast.__file__).parents[1] != Path(__file__).resolve().parents[1], "not the checkout"
info = kegfast.build_info()
if "--native" in sys.argv:
    assert info["native"], info["why"]
layer = kegfast.nn.TuckerConv2d(16, 24, 3, (8, 8), padding=1)
x = torch.randn(2, 16, 9, 11, requires_grad=True)
noises, samples = torch.randn(20, 4), torch.randn(20, 30, requires_grad=True)


def everything() -> list[torch.Tensor]:
    """The operators' values and their gradients."""
    y = layer(x)
    loss = y.square().mean() + kegfast.nn.DiversityLoss()(noises, samples)
    loss = loss + kegfast.functional.soft_target(y.mean((2, 3)), y.detach().amax((2, 3)), 2.0)
    return [y, loss, *torch.autograd.grad(loss, [x, samples, *layer.parameters()])]


compiled = everything()
with kegfast.backend("reference"):
    plain = everything()
for got, want in zip(compiled, plain, strict=True):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
isa = info.get("isa_active", "plain torch")
print(f"kegfast {info['version']} on torch {torch.__version__}: {isa}, as the definitions")
