"""Encoders of input sets: elements or windows of vectors as tokens, pooled tokens, and normalised inputs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from setpred.encoders.isab import ISAB
from setpred.errors import InputError, shown
from setpred.nn import MLP, EncoderLayer, copy_attributes
from setpred.sets import check_set, fill_absent, token_mask


class Elements(nn.Module):
    """Encoder that returns the elements of an input set as tokens, unchanged.

    Args:
        set_dim: numbers of an element.
    """

    def __init__(self, *, set_dim: int) -> None:
        super().__init__()
        self.in_dim = self.token_dim = set_dim

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[batch, n, set_dim]` and bool `[batch, n]` -> `[batch, n, set_dim]`."""
        check_set(elements, mask, set_dim=self.in_dim)
        return elements


class SetTokens(nn.Module):
    """Base class of encoders from an input set to tokens: rows of each element, then layers of self-attention.

        X_0 = rows(x_i) of all elements i,    X_l = layer_l(X_{l-1})

    Set-equivariant: elements in another order give the tokens in another order. The layers are SAB or ISAB of the Set
    Transformer, `setpred.nn.EncoderLayer` without positions or `setpred.encoders.isab.ISAB`.

    Args:
        input_dim: numbers of an element.
        token_dim: length of a token.
        layers: layers of self-attention.
        heads: heads of every attention, a divisor of `token_dim`.
        hidden_dim: width of the hidden layers.
        induced: points of an ISAB, for large sets; 0 takes SAB.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self, *, input_dim: int, token_dim: int, layers: int, heads: int, hidden_dim: int, induced: int = 0
    ) -> None:
        super().__init__()
        if min(input_dim, token_dim, hidden_dim) < 1 or min(layers, induced) < 0:
            raise InputError(
                "expected input_dim, token_dim and hidden_dim of at least 1, layers and induced of at least 0, got "
                f"{input_dim}, {token_dim}, {hidden_dim}, {layers} and {induced}"
            )
        self.in_dim, self.token_dim = input_dim, token_dim
        sizes = {"heads": heads, "hidden_dim": hidden_dim}
        self.layers = nn.ModuleList(
            ISAB(token_dim, points=induced, **sizes) if induced else EncoderLayer(token_dim, **sizes)
            for _ in range(layers)
        )

    def rows(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        """`[batch, n, input_dim]`, zero where absent -> `[batch, n, tokens, token_dim]`, any numbers where absent."""
        raise NotImplementedError

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[batch, n, input_dim]` and bool `[batch, n]` -> `[batch, n * tokens, token_dim]`."""
        check_set(elements, mask, set_dim=self.in_dim)
        rows = self.rows(fill_absent(elements, mask), mask).flatten(1, 2)
        if mask is not None:
            mask = token_mask(mask, rows.shape[1])
            mask = mask | ~mask.any(1, keepdim=True)  # an empty set attends to its padding, which no reader sees
        for layer in self.layers:
            rows = layer(rows, mask=mask)
        return rows


def local_moments(elements: Tensor, mask: Tensor | None = None, *, scales: int) -> Tensor:
    """Compute density, mean shift and spread of the set around each element, at scales s = 2, 1, 1/2, ...

        w_ij = exp(-|x_i - x_j|² / (K s²)),    c = Σ_j w_ij,    μ = Σ_j w_ij x_j / c,    v = Σ_j w_ij x_j² / c - μ²

    for elements of K numbers; the result is [log c, (μ - x_i) / s, v / s²] of all scales. μ - x_i is the step of mean
    shift (Comaniciu and Meer, 2002).

    Args:
        elements: `[batch, n, K]`; numbers of about unit variance.
        mask: present elements, bool `[batch, n]`.

    Returns:
        `[batch, n, scales * (1 + 2 K)]`, of absent elements any numbers.
    """
    elements, dim = fill_absent(elements, mask), elements.shape[-1]
    lengths = elements.square().sum(-1)
    distances = (lengths.unsqueeze(2) + lengths.unsqueeze(1) - 2 * elements @ elements.mT).clamp(min=0)
    powers = torch.cat([torch.ones_like(elements[..., :1]), elements, elements.square()], dim=-1)
    powers, found = fill_absent(powers, mask), []
    for scale in (2.0 ** (1 - number) for number in range(scales)):
        sums = (-distances / (dim * scale**2)).exp() @ powers
        count = sums[..., :1].clamp(min=torch.finfo(sums.dtype).tiny)  # an absent element far from all others
        mean, square = (sums[..., 1:] / count).split(dim, dim=-1)
        spread = (square - mean.square()).clamp(min=0)
        found += [count.log(), (mean - elements) / scale, spread / scale**2]
    return torch.cat(found, dim=-1)


class ElementTokens(SetTokens):
    """Encoder from an input set to tokens: an MLP for each element, then layers of self-attention.

        X_0 = MLP([x_i, moments of the set around x_i])

    `local_moments` tell each element what is around it, at several scales, which attention alone is slow to learn. Sets
    of n elements take memory and time of n², or of n with `scales=0` and `induced` points. See `SetTokens` for the
    layers.

    Args:
        scales: number of scales of the moments; 0 for none, as single vectors need.
        tokens: tokens of each element.
        input_dim, token_dim, layers, heads, hidden_dim, induced: those of `SetTokens`.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self,
        *,
        input_dim: int,
        scales: int = 6,
        tokens: int = 1,
        token_dim: int = 64,
        layers: int = 1,
        heads: int = 4,
        hidden_dim: int = 128,
        induced: int = 0,
    ) -> None:
        sizes = {"token_dim": token_dim, "layers": layers, "heads": heads, "hidden_dim": hidden_dim}
        super().__init__(input_dim=input_dim, induced=induced, **sizes)
        if tokens < 1 or scales < 0:
            raise InputError(f"expected at least 1 token of an element and 0 scales, got {tokens} and {scales}")
        self.scales, self.tokens = scales, tokens
        numbers = input_dim + scales * (1 + 2 * input_dim)
        self.network = MLP(numbers, hidden_dim, hidden_dim, tokens * token_dim)

    def rows(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        numbers = [elements] if self.scales == 0 else [elements, local_moments(elements, mask, scales=self.scales)]
        return self.network(fill_absent(torch.cat(numbers, -1), mask)).unflatten(-1, (self.tokens, self.token_dim))


class WindowTokens(SetTokens):
    """Encoder from a vector, such as a spectrum, to tokens: an MLP for each window, then layers of self-attention.

        X_0 = MLP(x[s p : s p + w]) + e_p,    p = 0, 1, ...

    with window w, stride s and learned positions e. The last window is filled up with zeros. Numbers next to each other
    in the vector should belong together. An input set of several vectors has the tokens of all; see `SetTokens`.

    Args:
        window: w, numbers of a window.
        stride: s, numbers between the beginnings of two windows.
        input_dim, token_dim, layers, heads, hidden_dim: those of `SetTokens`.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self,
        *,
        input_dim: int,
        window: int = 16,
        stride: int = 4,
        token_dim: int = 64,
        layers: int = 2,
        heads: int = 4,
        hidden_dim: int = 128,
    ) -> None:
        sizes = {"token_dim": token_dim, "layers": layers, "heads": heads, "hidden_dim": hidden_dim}
        super().__init__(input_dim=input_dim, **sizes)
        if not 1 <= stride <= window <= input_dim:
            raise InputError(f"expected 1 <= stride <= window <= {input_dim}, got {stride} and {window}")
        self.window, self.stride = window, stride
        self.missing = -(input_dim - window) % stride
        self.network = MLP(window, hidden_dim, token_dim)
        self.positions = nn.Parameter(0.1 * torch.randn((input_dim - window + self.missing) // stride + 1, token_dim))

    def rows(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        windows = nn.functional.pad(elements, (0, self.missing)).unfold(-1, self.window, self.stride)
        return self.network(windows) + self.positions


class Pooled(nn.Module):
    """Encoder to a vector: the tokens of another encoder, pooled.

        z = aggregator(tokens(x))

    With `ElementTokens` of `scales=0` and `setpred.aggregators.PMA` it is the encoder of the Set Transformer (Lee et
    al., ICML 2019).

    Args:
        tokens: encoder from images or sets to tokens `[batch, n, token_dim]`.
        aggregator: a `setpred.aggregators.Aggregator` of that `in_dim`.

    Raises:
        InputError: an encoder of vectors, or an aggregator of another `in_dim`.
    """

    def __init__(self, tokens: nn.Module, aggregator: nn.Module) -> None:
        super().__init__()
        if (length := getattr(tokens, "token_dim", None)) != aggregator.in_dim:
            raise InputError(
                f"expected tokens of the aggregator's {aggregator.in_dim} numbers, got {length} from "
                f"{type(tokens).__name__}; give both the same"
            )
        self.tokens, self.aggregator, self.latent_dim = tokens, aggregator, aggregator.out_dim
        copy_attributes(tokens, self, ("in_dim", "image_size"))

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images, or `[batch, n, in_dim]` and bool `[batch, n]` -> `[batch, latent_dim]`."""
        if mask is None:
            return self.aggregator(self.tokens(inputs))
        tokens = self.tokens(inputs, mask)
        return self.aggregator(tokens, token_mask(mask, tokens.shape[1]))


class Normalised(nn.Module):
    """Set encoder on normalised inputs: encoder((x - offset) / scale), number by number.

    The model holds the units of its inputs, so that data, predictions and exported programs have the inputs as they
    were measured. `setpred train` takes offset and scale from the training file.

    Args:
        encoder: a set encoder, with an `in_dim`.
        input_offset, input_scale: of each number of an element.

    Raises:
        InputError: another count than the encoder's `in_dim`, or a number out of range.
    """

    def __init__(self, encoder: nn.Module, *, input_offset: Sequence[float], input_scale: Sequence[float]) -> None:
        super().__init__()
        self.encoder, dim = encoder, getattr(encoder, "in_dim", None)
        if not len(input_offset) == len(input_scale) == dim:
            raise InputError(
                f"expected an encoder of sets, and offset and scale of its {dim} numbers, got {len(input_offset)} "
                f"and {len(input_scale)}"
            )
        if not all(map(math.isfinite, input_offset)) or not all(0 < scale < math.inf for scale in input_scale):
            raise InputError(f"expected finite offsets and scales > 0, got {shown(input_offset)}, {shown(input_scale)}")
        copy_attributes(encoder, self, ("in_dim", "token_dim", "latent_dim"))
        for name, numbers in (("offset", input_offset), ("scale", input_scale)):
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32), persistent=False)

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[batch, n, in_dim]` and bool `[batch, n]` -> the encoder's features."""
        check_set(elements, mask, set_dim=self.in_dim)
        return self.encoder((elements - self.offset) / self.scale, mask)
