"""The deep multilayer perceptron of the paper's tabular experiments (after Olson et al. 2018)."""

from itertools import pairwise

from torch import Tensor, nn

from kegfast._util import check


class MLP(nn.Module):
    """Hidden layers of equal width with ELU, then one linear layer.

    Args:
        in_features: width of the samples.
        num_classes: number of logits.
        units: width of the hidden layers.
        depth: number of hidden layers.
        dropout: probability after each hidden layer.

    Raises:
        TypeError, ValueError: a size is no positive int, or `dropout` is outside [0, 1].
    """

    def __init__(
        self, in_features: int, num_classes: int, *, units: int = 100, depth: int = 11, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check.counts(in_features=in_features, num_classes=num_classes, units=units, depth=depth)
        check.number("dropout", dropout, least=0, most=1)
        widths = [in_features] + [units] * depth
        hidden = [
            nn.Sequential(nn.Linear(before, after), nn.ELU(), nn.Dropout(dropout))
            for before, after in pairwise(widths)
        ]
        self.hidden = nn.Sequential(*hidden)
        self.output = nn.Linear(widths[-1], num_classes)

    def forward(
        self,
        x: Tensor,  # (N, in_features)
    ) -> Tensor:
        """Logits (N, num_classes)."""
        return self.output(self.hidden(x))
