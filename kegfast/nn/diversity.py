"""The diversity loss as a module."""

from torch import Tensor, nn

from kegfast import functional


class DiversityLoss(nn.Module):
    """`kegfast.functional.diversity_loss` as a module; the call that KegNet and FedGen code makes.

    Args:
        metric, noise_metric, reduction, log: as in `kegfast.functional.diversity_loss`.

    Raises:
        TypeError, ValueError: for another option, here as well as there.
    """

    def __init__(
        self,
        metric: functional.Metric = "l1",
        noise_metric: functional.NoiseMetric = "sqeuclidean",
        reduction: functional.Reduction = "mean",
        log: bool = False,
    ):
        super().__init__()
        functional.check_diversity_options(metric, noise_metric, reduction, log)
        self.metric, self.noise_metric = metric, noise_metric
        self.reduction, self.log = reduction, log

    def forward(
        self,
        noises: Tensor,  # (B, nz)
        layer: Tensor,  # (B, ...)
        labels: Tensor | None = None,  # (B,)
    ) -> Tensor:  # ()
        """The diversity loss of the samples `layer` made from `noises`, among equal `labels` if given."""
        return functional.diversity_loss(
            noises,
            layer,
            metric=self.metric,
            noise_metric=self.noise_metric,
            reduction=self.reduction,
            log=self.log,
            labels=labels,
        )

    def extra_repr(self) -> str:
        return (
            f"metric={self.metric!r}, noise_metric={self.noise_metric!r}, "
            f"reduction={self.reduction!r}, log={self.log}"
        )
