"""Flow matching over sets: noise becomes a set that the features allow, another one for each seed."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from setpred.decoders.base import SetDecoder
from setpred.decoders.detr import DecoderLayer
from setpred.decoders.starts import RandomStart
from setpred.errors import InputError
from setpred.matching import hungarian, pairwise_squared
from setpred.nn import MLP


class FlowMatching(SetDecoder):
    """Sampler of sets: noise flows along a learned velocity to a set that is likely, given the features.

        Y_t = (1 - t) ε + t Y_π,    Ŷ = D(Y_t, t; X) ≈ E[Y_π | Y_t, X],    dY_t/dt = (Ŷ - Y_t) / (1 - t)

    A training step draws noise ε and a time t in [0, 1] for each example, matches the elements of ε to those of the
    target Y (π, of least squared distance, so that paths hardly cross), and yields Ŷ in the order of the target. The
    loss must keep this order: `HungarianLoss(aligned=True)`. A loss that matches again lets Ŷ permute against Y_t, and
    more steps then make worse sets. Otherwise `predictions` yields the iterates Y_0 = ε, …, Y_1 of T equal Euler steps,

        Y_{t+1/T} = Y_t + (Ŷ - Y_t) / (T (1 - t)),

    which are those of DDIM for this path; the last step returns its Ŷ. The set of each seed is a sample of p(Y | X):
    noise has no order, and D, a transformer decoder over the elements, permutes with them.

    Flow matching: Lipman et al., ICLR 2023; DDIM: Song, Meng, Ermon, ICLR 2021; matched noise: Klein, Krämer, Noé,
    NeurIPS 2023; detection from noise with a set loss on the clean prediction: DiffusionDet, Chen et al., ICCV 2023.

    Args:
        token_dim: length of a token; None for a vector.
        latent_dim: length of the vector, without `token_dim`.
        dim, heads, layers, hidden_dim: width, heads, layers and width of the layers' networks of D.
        iterations: default number T of steps.
        start: ε from the features; `RandomStart` of scale 1 unless given.
        set_size, set_dim: elements of the predicted sets, and numbers of each; presence is one of them, with noise.

    Raises:
        InputError: no layer, or negative iterations.
    """

    iterative = denoises = True

    def __init__(
        self,
        *,
        token_dim: int | None = None,
        latent_dim: int | None = None,
        dim: int = 128,
        heads: int = 8,
        layers: int = 3,
        hidden_dim: int = 256,
        iterations: int = 10,
        start: nn.Module | None = None,
        set_size: int,
        set_dim: int,
    ) -> None:
        super().__init__(set_size=set_size, set_dim=set_dim, token_dim=token_dim, latent_dim=latent_dim)
        if layers < 1 or iterations < 0 or (token_dim is None) == (latent_dim is None):
            raise InputError(
                "expected layers >= 1, iterations >= 0 and one of token_dim and latent_dim, got "
                f"{layers}, {iterations}, {token_dim} and {latent_dim}; change the one that is out of range"
            )
        self.iterations = iterations
        self.start = RandomStart(set_size, set_dim, scale=1.0) if start is None else start
        self.narrow = nn.Linear(token_dim or latent_dim, dim)
        self.widen, self.time = nn.Linear(set_dim, dim), MLP(1, dim, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads=heads, hidden_dim=hidden_dim) for _ in range(layers))
        self.head = MLP(dim, dim, set_dim)

    def predictions(
        self, features: Tensor, mask: Tensor | None, iterations: int, target: Tensor | None = None
    ) -> Iterator[Tensor]:
        tokens = self.narrow(features if features.ndim == 3 else features.unsqueeze(1))
        noise = self.start(features).to(features.dtype)
        if target is not None:
            if target.shape != noise.shape:
                raise ValueError(f"expected target {list(noise.shape)}, got {list(target.shape)}")
            time = torch.rand(len(target), 1, 1, dtype=noise.dtype, device=noise.device)
            matched = hungarian(pairwise_squared(noise, target)).unsqueeze(-1).expand_as(noise)
            yield self.denoise((1 - time) * noise.gather(1, matched) + time * target, time, tokens, mask)
            return
        yield noise
        elements = noise
        for step in range(iterations):
            time = torch.full_like(noise[:, :1, :1], step / iterations)
            clean = self.denoise(elements, time, tokens, mask)
            elements = elements + (clean - elements) / (iterations - step)
            yield elements

    def denoise(self, elements: Tensor, time: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """D(Y_t, t; X): `[batch, set_size, set_dim]`, t `[batch, 1, 1]` and X `[batch, tokens, dim]` to a clean set."""
        rows = self.widen(elements) + self.time(time)
        for layer in self.layers:
            rows = layer(rows, None, tokens, None, mask)
        return self.head(rows)
