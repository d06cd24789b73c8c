"""iDSPN decoder: a set found by descent on an objective."""

from collections.abc import Iterator

from torch import Tensor, nn

from setpred.decoders.base import SetDecoder
from setpred.decoders.starts import RandomStart
from setpred.errors import InputError
from setpred.inner import GradientDescent, Problem
from setpred.inner.compiled import CompiledEnergy
from setpred.inner.differentiation import Differentiation, Implicit
from setpred.inner.objectives import Energy


class IDSPN(SetDecoder):
    """Decoder that finds a set by descent on an objective (iDSPN, DSPN).

    Y*(z) = argmin_Y L(Y; z, θ) by gradient descent from Y₀.

    `Implicit` differentiation with the identity solver is iDSPN (Zhang et al., ICLR 2022); `Unrolled` is DSPN (Zhang,
    Hare, Prügel-Bennett, NeurIPS 2019). Features are z, or tokens for objectives that read them. `mask` is of the
    predicted elements, and `condition` goes to `Conditioned` objectives.

    Args:
        objective: L(elements, `Problem`) -> `[batch]`.
        descent: how to iterate.
        differentiation: how gradients pass; `Implicit()` unless given.
        set_size, set_dim: elements of the predicted sets, and numbers of each.
        start: Y₀ from the features; `RandomStart` unless given. The descent projects it first, as in the released
            iDSPN.
        compile: compiles the steps without gradients; see `setpred.inner.compiled`. Not with `Implicit(best=True)`,
            which reads every step's gradient.

    Raises:
        InputError: `compile` with `Implicit(best=True)`; parts of the objective that read tokens of different lengths.
    """

    iterative = masks_elements = True

    def __init__(
        self,
        objective: nn.Module,
        descent: GradientDescent,
        differentiation: Differentiation | None = None,
        *,
        set_size: int,
        set_dim: int,
        start: nn.Module | None = None,
        compile: bool = False,
    ) -> None:
        # tokens if a part of the objective reads them, else a vector
        parts = list(objective.modules())
        read = {part.token_dim for part in parts if getattr(part, "token_dim", None) is not None}
        if len(read) > 1:
            raise InputError(f"expected one token_dim in the parts of the objective, got {sorted(read)}; make it one")
        super().__init__(set_size=set_size, set_dim=set_dim, token_dim=next(iter(read), None))
        self.objective, self.descent = objective, descent
        self.differentiation = Implicit() if differentiation is None else differentiation
        if compile and getattr(self.differentiation, "best", False):
            raise InputError("expected at most one of compile and best, got both; set compile or best to false")
        self.start = RandomStart(set_size, set_dim) if start is None else start
        self.compiled = compile
        self.conditional = any(getattr(part, "conditional", False) for part in parts)

    @property
    def iterations(self) -> int:
        """Default number of descent steps."""
        return self.descent.iterations

    def predictions(
        self, features: Tensor, mask: Tensor | None, iterations: int, condition: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield every iterate Y₀, …, Y_T."""
        initial = self.descent.project(self.start(features).to(features.dtype))
        problem = Problem(features, initial, mask, condition)
        energy = (CompiledEnergy if self.compiled else Energy)(self.objective, problem)
        yield from self.differentiation.iterates(energy, initial, self.descent, iterations)


def descending(decoder: nn.Module) -> IDSPN | None:
    """Find the iDSPN that refines the sets of a decoder: the decoder itself, or the slots that it reads."""
    return next((part for part in decoder.modules() if isinstance(part, IDSPN)), None)
