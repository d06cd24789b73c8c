"""Attention, AttSets, monoid, orbits, frames and superset pooling: twins, known answers and what each paper claims.

The laws they share with all aggregators are in test_aggregators.py.
"""

import pytest
import torch

from setpred.aggregators import AttentionPool, SetEncoder
from setpred.decoders import IDSPN
from setpred.errors import InputError
from setpred.inner import GradientDescent, Implicit, LatentMatching, Problem

DIM, SIZE = 6, 5
# name to (constructor, whether equal elements can get unequal gradients)
RIVALS = {
    "attention": (lambda: AttentionPool(DIM, seeds=2, heads=2), False),
}


def random_set(batch=3, size=SIZE, dim=DIM, seed=1, dtype=torch.float64):
    return torch.randn(batch, size, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def scramble(module, seed=5):
    """Every parameter random, those that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return module.double()


@pytest.mark.parametrize(("build", "separates"), RIVALS.values(), ids=RIVALS.keys())
def test_every_aggregator_works_in_a_decoder(build, separates):
    """As `SetEncoder(aggregator)` inside the objective: every parameter learns, and equal elements part or cannot."""
    torch.manual_seed(0)
    encoder = SetEncoder(build(), set_dim=4, hidden_dim=8)
    scramble(encoder)
    objective = LatentMatching(encoder)
    decoder = IDSPN(objective, GradientDescent(iterations=3, clip=1.0), Implicit(), set_size=SIZE, set_dim=4)
    latent = torch.linspace(-1, 1, encoder.out_dim, dtype=torch.float64).expand(2, -1)
    decoder(latent, index=torch.arange(2)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name

    equal = random_set(batch=1, size=1, dim=4).expand(1, SIZE, 4).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(equal, Problem(latent[:1], equal)).sum(), equal)
    spread = float(gradient.std(dim=1).max() / gradient.abs().max())
    assert (spread > 1e-3) if separates else (spread < 1e-12)


# --- attention ---


def test_attention_is_torchs():
    """The same weights in torch's own attention and layer norm."""
    pool = scramble(AttentionPool(DIM, seeds=2, heads=3))
    theirs = torch.nn.MultiheadAttention(DIM, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([pool.query.weight, pool.key.weight, pool.value.weight]))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.load_state_dict(pool.out.state_dict())
    elements, seeds = random_set(), pool.seeds.expand(3, -1, -1)
    mask = torch.tensor([[True] * SIZE, [False, True, True, False, True], [True] + [False] * 4])
    read, _ = theirs(seeds, elements, elements, key_padding_mask=~mask, need_weights=False)
    first, second = pool.norms
    hidden = torch.nn.functional.layer_norm(seeds + read, (DIM,), first.weight, first.bias)
    hidden = torch.nn.functional.layer_norm(hidden + pool.network(hidden), (DIM,), second.weight, second.bias)
    torch.testing.assert_close(pool(elements, mask), hidden.flatten(1))


def test_attention_that_does_not_look_is_a_mean():
    torch.manual_seed(0)
    pool = AttentionPool(DIM, heads=2, normalise=False).double()
    with torch.no_grad():
        for parameter in (pool.seeds, pool.key.weight, pool.out.bias, *pool.network.parameters()):
            parameter.zero_()
        for layer in (pool.value, pool.out):
            layer.weight.copy_(torch.eye(DIM))
    elements = random_set()
    torch.testing.assert_close(pool(elements), elements.mean(1))


@pytest.mark.parametrize("numbers", [{"heads": 4}, {"heads": 0}, {"seeds": 0, "heads": 2}])
def test_attention_refuses_heads_that_do_not_fit(numbers):
    with pytest.raises(InputError, match="heads that divides in_dim"):
        AttentionPool(DIM, **numbers)
