"""Small network parts that several floors share."""

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from setpred.errors import InputError

Part = TypeVar("Part", bound=type)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def recorded(part: Part) -> Part:
    """Class decorator: its objects remember their arguments, so that `setpred.checkpoint.save_model` can save them.

    All parts of setpred have it. Decorate parts of your own that you build in Python:

    >>> @recorded
    ... class Scale(nn.Module):
    ...     def __init__(self, factor: float = 2.0) -> None:
    ...         super().__init__()
    >>> arguments_of(Scale(3.0))
    {'factor': 3.0}
    """
    build, signature = part.__init__, inspect.signature(part.__init__)
    kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}

    @functools.wraps(build)
    def __init__(self: Any, *arguments: Any, **named: Any) -> None:
        build(self, *arguments, **named)
        bound = signature.bind(self, *arguments, **named)
        bound.apply_defaults()  # those of a later version may differ
        _, *given = bound.arguments.items()
        given = dict(given)
        given |= given.pop(kinds.get(inspect.Parameter.VAR_KEYWORD), {})
        if not given.pop(kinds.get(inspect.Parameter.VAR_POSITIONAL), ()):  # which have no names
            self.__dict__[_ARGUMENTS] = (part, given)  # afterwards: of a class and its base the class stays

    part.__init__ = __init__
    return part


_ARGUMENTS = "_recorded_arguments"


def arguments_of(part: Any) -> dict[str, Any] | None:
    """The arguments that a `recorded` part was built with, by name; None if they are not known."""
    build, (owner, arguments) = type(part).__init__, vars(part).get(_ARGUMENTS, (object, {}))
    if build in (object.__init__, nn.Module.__init__):  # takes none
        return {}
    return arguments if build is owner.__init__ else None


def record_parts(module: dict[str, Any]) -> None:
    """Apply `recorded` to the classes that a module exports, given its `globals()`."""
    for part in (module[name] for name in module["__all__"]):
        if isinstance(part, type) and "__init__" in vars(part) and not dataclasses.is_dataclass(part):
            recorded(part)


def unit_images(images: Tensor) -> Tensor:
    """Convert uint8 images to float in [0, 1]; leave float images."""
    # in place, because memory traffic takes most of the time of a large batch
    return images.float().div_(255) if images.dtype == torch.uint8 else images


POSE = 12  # numbers of a camera's pose: its location, and the three columns of the matrix of its rays
LAYER = 4  # numbers of a layer at each pixel: red, green, blue, and the logit of its mask


class Composite(NamedTuple):
    """Image that layers draw together, with the mask and the colours of each layer.

    image: `[batch, 3, S, S]`; masks: `[batch, n, S, S]`, of sum 1 at every pixel; colours: `[batch, n, 3, S, S]`.
    """

    image: Tensor
    masks: Tensor
    colours: Tensor


def composite(layers: Tensor) -> Composite:
    """Draw layers `[batch, n, 4 · S²]` over each other: image = Σ_i softmax_i(α_i) · colour_i.

    Raises:
        ValueError: layers of another shape.
    """
    side = math.isqrt(layers.shape[-1] // LAYER)
    if layers.ndim != 3 or LAYER * side**2 != layers.shape[-1]:
        raise ValueError(f"expected layers [batch, n, {LAYER} · side²], got {list(layers.shape)}")
    colours, logits = layers.unflatten(-1, (LAYER, side, side)).split([LAYER - 1, 1], dim=2)
    masks = logits.squeeze(2).softmax(1)
    return Composite((masks.unsqueeze(2) * colours).sum(1), masks, colours)


class MLP(nn.Sequential):
    """Linear layers with ReLU between: `widths[0] -> widths[1] -> ... -> widths[-1]`, last one linear."""

    def __init__(self, *widths: int) -> None:
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            layers += [nn.Linear(narrow, wide), nn.ReLU()]
        super().__init__(*layers[:-1])


def product_by_rows(few: Tensor, many: Tensor) -> Tensor:
    """Compute few @ many, `[batch, n, k]` and `[batch, k, m]`, with equal results for equal examples to the last bit.

    Where n is not a multiple of 4, MKL's kernel depends on the alignment of an example, and kernels round differently.
    """
    rows = few.shape[1]
    return (nn.functional.pad(few, (0, 0, 0, -rows % 4)) @ many)[:, :rows] if rows % 4 else few @ many


# terms of e⁻⁸⁰ change no sum with 1 in it, and MKL's exp takes ten to thirty times as long where it underflows
SMALLEST_EXPONENT = -80.0


def log_sum_exp(values: Tensor, dim: int) -> Tensor:
    """Compute log Σ exp along a dimension, without underflow: terms under e⁻⁸⁰ of the largest count as e⁻⁸⁰."""
    largest = values.detach().amax(dim, keepdim=True)
    return (values - largest).clamp(min=SMALLEST_EXPONENT).exp().sum(dim).log() + largest.squeeze(dim)


def softplus_inverse(value: float) -> float:
    """Compute x with softplus(x) = value, the raw value of a positive parameter."""
    return value + math.log(-math.expm1(-value))  # log(eˣ - 1), without overflow


def diagonal(first: Sequence[float], size: int, rest: float = 1.0) -> Tensor:
    """Build the diagonal `[size]` of the numbers `first`, continued by `rest`.

    Raises:
        InputError: more than `size` numbers, or one that is not positive and finite.
    """
    numbers = [float(number) for number in first]  # no tensor, which cannot be compared on the meta device
    if len(numbers) > size or not all(0 < number < math.inf for number in (*numbers, rest)):
        raise InputError(
            f"expected at most {size} positive numbers, got {list(first)} and {rest:g} for the rest; correct them"
        )
    return torch.cat([torch.tensor(numbers), torch.full((size - len(numbers),), float(rest))])


class Positive(nn.Module):
    """A learned positive number, softplus(raw), that **starts at `value`**."""

    def __init__(self, value: float) -> None:
        super().__init__()
        if value <= 0:
            raise ValueError(f"expected a positive start value, got {value}")
        self.raw = nn.Parameter(torch.tensor(softplus_inverse(value)))

    def forward(self) -> Tensor:
        return nn.functional.softplus(self.raw)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation by elementary operations, with correct derivatives of every order.

    The third derivative of torch's fused layer norm is wrong (in torch 2.14, against finite differences), and a
    potential inside an objective inside a training loss is differentiated three times.
    """

    def forward(self, input: Tensor) -> Tensor:
        centred = input - input.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return centred * scale * self.weight + self.bias


class Attention(nn.Module):
    """Multi-head attention: softmax(q kᵀ / √d) v for each head, then a linear layer (Vaswani et al., NeurIPS 2017).

    Args:
        dim: length of a row.
        heads: number of heads, a divisor of `dim`.
        dropout: probability of dropping a weight in training.

    Raises:
        InputError: a number of heads that does not divide `dim`.
    """

    def __init__(self, dim: int, *, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise InputError(f"expected a number of heads that divides {dim}, got {heads}; choose another")
        self.heads, self.dropout = heads, dropout
        self.query, self.value, self.out = (nn.Linear(dim, dim) for _ in range(3))
        self.key = nn.Linear(dim, dim, bias=False)  # the same for all keys, a bias would change no weight
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[batch, n, dim]` from n queries, m keys and values, and a mask of these `[batch, m]`, True where present."""
        rows = (
            layer(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, part in ((self.query, queries), (self.key, keys), (self.value, values))
        )
        attended = functional.scaled_dot_product_attention(
            *rows,
            attn_mask=None if mask is None else mask[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(attended.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """X ← LN(X + A(X + P, X + P, X)),    X ← LN(X + MLP(X)),    P: positions, or none.

    The layer of DETR's encoder (Carion et al., ECCV 2020). Without P it is the original one, the SAB of the Set
    Transformer (Lee et al., ICML 2019); with a `source` S it is its MAB(X, S), of attention A(X, S, S).
    """

    def __init__(self, dim: int, *, heads: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = Attention(dim, heads=heads, dropout=dropout)
        self.network = MLP(dim, hidden_dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, rows: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, source: Tensor | None = None
    ) -> Tensor:
        """`[batch, rows, dim]` to the same.

        Args:
            rows: X.
            positions: P `[rows, dim]`.
            mask: present rows, or present rows of the source, bool `[batch, rows]`.
            source: S `[batch, rows of the source, dim]`, without positions; X itself unless given.
        """
        own = placed(rows, positions)
        keys, values = (own, rows) if source is None else (source, source)
        rows = self.norms[0](rows + self.dropout(self.attention(own, keys, values, mask)))
        return self.norms[1](rows + self.dropout(self.network(rows)))


def placed(rows: Tensor, positions: Tensor | None) -> Tensor:
    """Add positions to rows; None adds none."""
    return rows if positions is None else rows + positions


def batch_norms(module: nn.Module) -> list[BatchNorm]:
    """List the batch normalisations of a module that keep running statistics."""
    return [part for part in module.modules() if isinstance(part, BatchNorm) and part.track_running_stats]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and all its parts in evaluation mode; restore the mode of each part at exit."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


@contextmanager
def estimating_statistics(norms: Sequence[BatchNorm]) -> Iterator[None]:
    """Estimate running statistics again, as the mean over the forward passes within; at least one is needed.

    Running averages trail behind the weights: at a high learning rate they alone make a model worse in evaluation than
    in training. This is precise batch normalisation (Wu and Johnson, "Rethinking Batch in BatchNorm", 2021). Only the
    norms go into training mode.
    """
    before = [(norm.momentum, norm.training, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # weights all passes equally
        norm.train()
    try:
        yield
    finally:
        for norm, (momentum, training, tracked) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)
            norm.num_batches_tracked.copy_(tracked)


def copy_attributes(source: nn.Module, target: nn.Module, names: Sequence[str]) -> None:
    """Give a module those of the attributes that another one has and that are not None."""
    for name in names:
        if getattr(source, name, None) is not None:
            setattr(target, name, getattr(source, name))


def check_parts(encoder: nn.Module, decoder: nn.Module) -> None:
    """Raise `InputError` if the encoder gives other features than the decoder takes.

    Parts of tokens state their length as `token_dim`. The `latent_dim` of vectors is compared if both parts state it.
    """
    features = []
    for part in (encoder, decoder):
        tokens, vector = (getattr(part, name, None) for name in ("token_dim", "latent_dim"))
        features.append(("a vector", vector) if tokens is None else ("tokens", tokens))
    (given, size), (taken, wanted) = features
    if given == taken and (size == wanted or None in (size, wanted)):
        return
    if given == taken:
        advice = f"give both the same {'token_dim' if given == 'tokens' else 'latent_dim'}"
    else:
        example = "PositionedTokens" if taken == "tokens" else "SmallCNN"
        advice = f"take an encoder that gives {taken}, such as setpred.encoders.{example}"
        if (given, wanted) == ("tokens", None):  # what a part does not state, too
            advice += "; a decoder of tokens states their length as its attribute token_dim"
    gives, takes = (kind + (f" of {length} numbers" if length else "") for kind, length in features)
    names = [type(part).__name__ for part in (encoder, decoder)]
    raise InputError(f"the encoder {names[0]} gives {gives}, the decoder {names[1]} takes {takes}; {advice}")
