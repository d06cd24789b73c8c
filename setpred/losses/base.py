"""Base class of the set losses: checks, weights by group of numbers, and masks."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpred.errors import InputError
from setpred.matching import check_pair
from setpred.schema import ElementSchema
from setpred.sets import check_set, fill_absent, set_sizes

Mask = Tensor | None  # bool `[batch, set_size]`, True for present elements; None if all are


class SetLoss(nn.Module):
    """Base class of losses between a predicted and a target set: `[batch, n, dim]`, `[batch, m, dim]` to `[batch]`.

    A subclass implements `compare`. The loss does not depend on the order of either set. Masked elements have no
    influence on value and gradient, even if they hold NaN. Without masks, padding takes part as elements of zeros,
    presence included; this is how presence is learned.

    Args:
        weights: factor of a group's share of an element's cost, by its name in the schema: `{"coords": 10.0}`; 1 by
            default, not normalised.
        schema: schema with the groups, by default that of the task (`use_schema`).
        presence_threshold: masks elements of either set whose presence, their last number, is not above it. The cut
            has no gradient, so leave it out where presence is to be learned.

    Raises:
        InputError: a negative weight, or one of an unknown group; on use, groups without a schema.
    """

    def __init__(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        schema: ElementSchema | None = None,
        presence_threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.schema, self._own_schema = schema, schema is not None
        self.group_weights = dict(weights or {})
        self.grouped = bool(weights)  # whether elements must fit the schema
        self.presence_threshold = presence_threshold
        for name, weight in self.group_weights.items():
            if not weight >= 0:
                raise InputError(f"weight of {name!r}: expected at least 0, got {weight}")
        SetLoss._place_groups(self)

    def use_schema(self, schema: ElementSchema) -> None:
        """Take the groups of numbers from `schema`, here and in losses within, unless they were given a schema."""
        for part in self.modules():
            if isinstance(part, SetLoss) and not part._own_schema:
                part.schema = schema
                part._place_groups()

    def _place_groups(self) -> None:
        # not persistent: they follow from the configuration, and a checkpoint must fit every loss
        self.register_buffer("_weights", self.by_group(self.group_weights), persistent=False)

    def forward(
        self, predicted: Tensor, target: Tensor, predicted_mask: Mask = None, target_mask: Mask = None
    ) -> Tensor:
        """Loss of each example, `[batch]`.

        Args:
            predicted, target: elements `[batch, n, dim]` and `[batch, m, dim]`.
            predicted_mask, target_mask: bool `[batch, n]` and `[batch, m]`, which elements are present; all by default.
        """
        if self.grouped and self.schema is None:
            raise InputError(f"{type(self).__name__} has groups of numbers, expected a schema for them; pass schema")
        check_set(predicted, predicted_mask, set_dim=self.schema.set_dim if self.grouped else None)
        check_set(target, target_mask)
        check_pair(predicted, target)
        predicted, predicted_mask = self._present(predicted, predicted_mask)
        target, target_mask = self._present(target, target_mask)
        with torch.autocast(predicted.device.type, enabled=False):  # full precision, also where a model uses half
            return self.compare(predicted, target, predicted_mask, target_mask)

    def compare(self, predicted: Tensor, target: Tensor, predicted_mask: Mask, target_mask: Mask) -> Tensor:
        """Loss of each example, `[batch]`; absent elements are zeros here."""
        raise NotImplementedError

    def element_weights(self, elements: Tensor) -> Tensor | None:
        """w `[dim]` in the elements' dtype; None if all are 1."""
        return None if self._weights is None else self._weights.to(elements.dtype)

    def by_group(self, values: Mapping[str, float]) -> Tensor | None:
        """Spread values of groups over their numbers: `[dim]`, 1 for other groups; None without values or schema."""
        if not values or self.schema is None:
            return None
        vector = torch.ones(self.schema.set_dim)
        for name, value in values.items():
            vector[self.schema.slice(name)] = value
        return vector

    def _present(self, elements: Tensor, mask: Mask) -> tuple[Tensor, Mask]:
        """Apply the threshold, and replace absent elements by zeros."""
        if self.presence_threshold is not None:
            confident = elements.detach()[..., -1] > self.presence_threshold
            mask = confident if mask is None else mask & confident
        if not elements.shape[1]:  # one absent element, so that every minimum and sum is defined
            elements, mask = functional.pad(elements, (0, 0, 0, 1)), elements.new_zeros(elements.shape[0], 1).bool()
        return fill_absent(elements, mask), mask


def uniform_mass(elements: Tensor, mask: Mask) -> Tensor:
    """Spread one unit of mass evenly over the present elements, `[batch, n]`; zeros for an empty set."""
    mass = (1 / set_sizes(elements, mask).clamp(min=1)).unsqueeze(1).expand(elements.shape[:2])
    return mass if mask is None else mass * mask
