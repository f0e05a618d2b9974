"""A feature network between the context and a transform."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from .base import FlowTransform

__all__ = ["Embedded"]


class Embedded(FlowTransform):
    r"""Shows a conditional transform features of the context in place of the context: :math:`y = f(x;\ h(c))`.

    The feature network :math:`h` is evaluated once for each context, however many transforms :math:`f` composes and however many points share it.

    Args:
        transform: the conditional transform :math:`f`; its ``context_dim`` is the number of features.
        features: the network :math:`h`, from ``(N, context_dim)`` to ``(N, transform.context_dim)``, always with one batch dimension.
        context_dim: size of the raw context :math:`c`, a flat vector; a network on images starts with
            ``nn.Unflatten(-1, (channels, height, width))``.

    Cost: that of the transform, and one pass of the network a context.

    Raises:
        OptionError: the transform takes no context, or ``features`` is not a module.
        ShapeError: the network gives another number of features than the transform takes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Unflatten(-1, (1, 8, 8)), nn.Conv2d(1, 4, 3, 2), nn.Flatten(), nn.SiLU(), nn.Linear(36, 5))
        >>> from pyro_flows.transforms import Affine
        >>> y, ladj = Embedded(Affine(2, 5), net, 64).forward_and_ladj(torch.zeros(100, 3, 2), torch.randn(3, 64))
        >>> y.shape
        torch.Size([100, 3, 2])

    Reference: Guided image generation with conditional invertible neural networks (Ardizzone et al., 2019), https://arxiv.org/abs/1907.02392
    """

    def __init__(self, transform: FlowTransform, features: nn.Module, context_dim: int) -> None:
        if not isinstance(transform, FlowTransform) or not transform.context_dim:
            raise OptionError("Embedded: transform must be a FlowTransform that takes a context: build it with context_dim=")
        if not isinstance(features, nn.Module):
            raise OptionError(f"Embedded: features must be an nn.Module, got {type(features).__name__}")
        super().__init__(transform.event_shape, context_dim)
        if not context_dim:
            raise ShapeError("Embedded: context_dim must be positive, the size of the raw context")
        self.features, self.transform = features, transform
        self.one_pass, self.domain, self.codomain = transform.one_pass, transform.domain, transform.codomain
        self.manifold = transform.manifold

    def _check(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        super()._check(value, context)
        return value, context  # not yet broadcast: that would repeat the network's work for each point

    def _features(self, context: Tensor | None) -> Tensor:
        assert context is not None, "a missing context has been refused"
        rows = context.reshape(-1, self.context_dim)
        features = self.features(rows)
        if features.shape != (len(rows), self.transform.context_dim):
            raise ShapeError(
                f"Embedded: features gave shape {tuple(features.shape)} for a context of shape {tuple(rows.shape)}, but the transform takes "
                f"{self.transform.context_dim} features"
            )
        return features.reshape(*context.shape[:-1], self.transform.context_dim)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_ladj(x, self._features(context))

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(y, self._features(context))
