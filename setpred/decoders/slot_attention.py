"""Slot Attention, and implicit Slot Attention."""

from collections.abc import Iterator

from torch import Tensor, nn

from setpred.decoders.base import SetDecoder
from setpred.decoders.starts import GaussianStart
from setpred.errors import InputError
from setpred.inner import Unrolled
from setpred.nn import MLP


class SlotSoftmax(nn.Module):
    """Attention in which slots compete for each token: softmax over slots, then a weighted mean over tokens.

        A_is = exp(q_i · k_s / √d) / Σ_j exp(q_j · k_s / √d),    W_is = A_is / Σ_t A_it

    (Locatello et al., NeurIPS 2020.)
    """

    def draw(self, keys: Tensor, slots: int) -> Tensor | None:
        """Draw the random numbers of one prediction, shared by all its refinements: None."""
        return None

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None, noise: Tensor | None) -> Tensor:
        """Weights `[batch, heads, slots, tokens]`, of sum 1 over tokens.

        Args:
            queries: `[batch, heads, slots, dim]`.
            keys: `[batch, heads, tokens, dim]`.
            mask: present tokens, `[batch, tokens]`.
            noise: from `draw`; unused here.
        """
        scores = queries @ keys.mT / queries.shape[-1] ** 0.5
        shares = scores.softmax(dim=-2) + 1e-8  # keeps a mean for a slot without tokens
        if mask is not None:
            shares = shares * mask[:, None, None]
        return shares / shares.sum(dim=-1, keepdim=True)


class SlotAttention(SetDecoder):
    """Slots that compete for the tokens; each is refined by the tokens it receives, and read out as an element.

        S ← GRU(S, W V),    S ← S + MLP(LN(S)),    Y = head(S)

    W are the attention's weights between queries q(LN(S)) and keys k(LN(X)) of the tokens X, V = v(LN(X)) (Locatello
    et al., NeurIPS 2020). With several heads each has its own W, and a linear layer mixes the results (as in SAVi; Kipf
    et al., ICLR 2022). `gradient_steps=1` is implicit Slot Attention (Chang, Griffiths, Levine, NeurIPS 2022): see
    `setpred.inner.Unrolled`. Permuting the start permutes the elements; permuting the tokens changes nothing. So slots
    that start equal stay equal, unless the attention has noise (`MESH`).

    Args:
        attention: weights from queries and keys; `SlotSoftmax` unless given.
        token_dim, slot_dim: lengths of a token and of a slot.
        hidden_dim: width of the slots' MLP; the head's is `slot_dim`.
        heads: number of heads of the attention, a divisor of `slot_dim`.
        iterations: default number T of refinements.
        gradient_steps: number of last refinements that pass gradients, without any to the start; None passes gradients
            through all, and to the start.
        start: the first slots from the tokens; `GaussianStart` unless given.
        set_size, set_dim: elements of the predicted sets, one per slot, and numbers of each.

    Raises:
        InputError: a number out of range.
    """

    iterative = True

    def __init__(
        self,
        attention: nn.Module | None = None,
        *,
        token_dim: int = 64,
        slot_dim: int = 64,
        hidden_dim: int = 128,
        heads: int = 1,
        iterations: int = 3,
        gradient_steps: int | None = None,
        start: nn.Module | None = None,
        set_size: int,
        set_dim: int,
    ) -> None:
        super().__init__(set_size=set_size, set_dim=set_dim, token_dim=token_dim)
        if slot_dim % heads or iterations < 0 or (gradient_steps is not None and gradient_steps < 1):
            raise InputError(
                "expected slot_dim a multiple of heads, iterations >= 0 and gradient_steps >= 1, got "
                f"{slot_dim}, {heads}, {iterations} and {gradient_steps}; change the one that is out of range"
            )
        self.attention = SlotSoftmax() if attention is None else attention
        self.heads, self.iterations, self.gradient_steps = heads, iterations, gradient_steps
        self.start = GaussianStart(set_size, slot_dim) if start is None else start
        self.norm_tokens, self.norm_slots = nn.LayerNorm(token_dim), nn.LayerNorm(slot_dim)
        self.query = nn.Linear(slot_dim, slot_dim, bias=False)
        self.key, self.value = (nn.Linear(token_dim, slot_dim, bias=False) for _ in range(2))
        self.mix = nn.Identity() if heads == 1 else nn.Linear(slot_dim, slot_dim)
        self.recurrent = nn.GRUCell(slot_dim, slot_dim)
        self.residual = nn.Sequential(nn.LayerNorm(slot_dim), MLP(slot_dim, hidden_dim, slot_dim))
        self.head = MLP(slot_dim, slot_dim, set_dim)

    def predictions(self, features: Tensor, mask: Tensor | None, iterations: int) -> Iterator[Tensor]:
        tokens = self.norm_tokens(features)
        keys, values = self._by_head(self.key(tokens)), self._by_head(self.value(tokens))
        start = self.start(features).to(features.dtype)
        # drawn once for all refinements, as published, so that they break ties alike
        noise = self.attention.draw(keys, start.shape[1])

        def step(slots: Tensor) -> Tensor:
            queries = self._by_head(self.query(self.norm_slots(slots)))
            received = self.attention(queries, keys, mask, noise) @ values
            received = self.mix(received.transpose(1, 2).flatten(2))
            slots = self.recurrent(received.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            return slots + self.residual(slots)

        if self.gradient_steps is not None and self.gradient_steps <= iterations:
            start = start.detach()  # a fixed point does not depend on its start
        for slots in Unrolled(self.gradient_steps).states(step, start, iterations):
            yield self.head(slots)

    def _by_head(self, rows: Tensor) -> Tensor:
        """`[batch, rows, dim]` -> `[batch, heads, rows, dim / heads]`."""
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)
