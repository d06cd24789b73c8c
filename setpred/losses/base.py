"""What every set loss shares: the door where sets are checked, weights per group of numbers, and masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpred.errors import InputError
from setpred.matching import check_pair
from setpred.schema import CLEVR, ElementSchema
from setpred.sets import check_set


class SetLoss(nn.Module):
    """A predicted and a target set to one number: `[batch, n, dim]` and `[batch, m, dim]` to `[batch]`.

    Subclasses write `compare`. None of them sees the order of either set, and masked elements have no influence
    (value and gradient), whatever they hold. Without masks padding takes part, as elements that are zeros, presence
    included; that is how presence is learned.

    Args:
        weights: how much a group of numbers counts, by its name in the schema, `{"coords": 10.0}`; 1 where not
            named. Weights multiply the group's share of an element's cost and are not normalised.
        schema: where the groups lie in an element; CLEVR's unless given. Read only for `weights`.
        presence_threshold: elements of either set whose presence, their last number, is not over it count as
            masked: real objects against confident predictions. A cut has no gradient, so a presence that is to be
            learned needs None.

    Raises:
        InputError: a weight that is negative, or of a group that the schema does not have.
    """

    def __init__(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        schema: ElementSchema | None = None,
        presence_threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.schema = CLEVR if schema is None else schema
        self.group_weights = dict(weights or {})
        self.grouped = bool(weights)  # reads where the groups lie
        self.presence_threshold = presence_threshold
        for name, weight in self.group_weights.items():
            if not weight >= 0:
                raise InputError(f"weight of {name!r}: expected at least 0, got {weight}")
        # not persistent: a checkpoint's configuration says it, and its weights fit whatever the loss
        self.register_buffer("_weights", self.by_group(self.group_weights), persistent=False)

    def forward(
        self,
        predicted: Tensor,
        target: Tensor,
        predicted_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Loss of each example, `[batch]`.

        Args:
            predicted, target: elements `[batch, n, dim]` and `[batch, m, dim]`.
            predicted_mask, target_mask: which of them are present, bool `[batch, n]` and `[batch, m]`; all unless
                given.
        """
        check_set(predicted, predicted_mask, set_dim=self.schema.set_dim if self.grouped else None)
        check_set(target, target_mask)
        check_pair(predicted, target)
        predicted, predicted_mask = self._present(predicted, predicted_mask)
        target, target_mask = self._present(target, target_mask)
        with torch.autocast(predicted.device.type, enabled=False):  # full precision where a model trains in half
            return self.compare(predicted, target, predicted_mask, target_mask)

    def compare(
        self, predicted: Tensor, target: Tensor, predicted_mask: Tensor | None, target_mask: Tensor | None
    ) -> Tensor:
        """`[batch]`; absent elements are zeros here."""
        raise NotImplementedError

    def element_weights(self, elements: Tensor) -> Tensor | None:
        """w `[dim]` in the elements' dtype, or None where all are 1."""
        return None if self._weights is None else self._weights.to(elements.dtype)

    def by_group(self, values: Mapping[str, float]) -> Tensor | None:
        """`[dim]`: the value of each number's group, 1 where not named; None where none is."""
        vector = torch.ones(self.schema.set_dim)
        for name, value in values.items():
            vector[self.schema.slice(name)] = value
        return vector if values else None

    def _present(self, elements: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Which elements count, with zeros in the place of the others."""
        if self.presence_threshold is not None:
            confident = elements.detach()[..., -1] > self.presence_threshold
            mask = confident if mask is None else mask & confident
        if not elements.shape[1]:  # one absent element instead of none, for which every minimum and sum is defined
            elements, mask = functional.pad(elements, (0, 0, 0, 1)), elements.new_zeros(elements.shape[0], 1).bool()
        return (elements, None) if mask is None else (elements.masked_fill(~mask.unsqueeze(-1), 0.0), mask)


def counts(elements: Tensor, mask: Tensor | None) -> Tensor:
    """Number of present elements of each set, `[batch]`, in the elements' dtype."""
    if mask is None:
        return elements.new_full((elements.shape[0],), elements.shape[1])
    return mask.sum(1).to(elements.dtype)


def uniform_mass(elements: Tensor, mask: Tensor | None) -> Tensor:
    """One unit of mass spread evenly over the present elements, `[batch, n]`; zeros for an empty set."""
    share = 1 / counts(elements, mask).clamp(min=1)
    mass = share.unsqueeze(1).expand(elements.shape[:2])
    return mass if mask is None else mass * mask
