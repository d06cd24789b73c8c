"""Fast code against obvious code: ranks, first layers of pairs, compiled descents."""

import copy
import os
import shutil
from dataclasses import replace

import pytest
import torch
from problems import normal
from torch import nn

from benchmarks.decoder import KINDS, Sizes, objective_of, ways_of
from setpred.aggregators import FSPool, PairwiseSetEncoder, SetEncoder, SumPool
from setpred.aggregators.fspool import COUNTED, at_ranks, feature_ranks
from setpred.decoders import IDSPN, LearnedStart
from setpred.inner import (
    Conditioned,
    GradientDescent,
    Implicit,
    LatentMatching,
    Neumann,
    Proximity,
    Simplex,
    Sum,
    Unrolled,
    compiled,
)

SIZES = (1, 2, 5, COUNTED, COUNTED + 1, 36)  # counted and sorted; in compiled code blocks of 1 and of 12


def traced(function):
    """As in compiled code, but run by PyTorch as it is."""
    torch.compiler.reset()
    return torch.compile(function, backend="eager", fullgraph=True, dynamic=False)


def features(size, *, ties, batch=3, dim=4):
    elements = normal(batch, size, dim, seed=size)
    # half of the elements are copies of others, and one feature has three values in all
    if ties:
        elements[:, size // 2 :] = elements[:, : size - size // 2].flip(1)
        elements[..., 0] = elements[..., 0].sign()
    return elements


AS_WRITTEN_AND_COMPILED = pytest.mark.parametrize("how", [lambda f: f, traced], ids=["as written", "compiled"])


@pytest.mark.parametrize("size", SIZES)
@AS_WRITTEN_AND_COMPILED
def test_ranks_are_places_in_the_stable_order(how, size):
    values = torch.cat([features(size, ties=ties) for ties in (False, True)])
    order = values.sort(dim=1, descending=True, stable=True).indices
    expected = order.argsort(1)
    ranks = how(feature_ranks)(values)
    assert torch.equal(ranks.long(), expected)
    table = torch.randn(1, size, values.shape[-1], dtype=values.dtype)
    assert torch.equal(how(at_ranks)(table, ranks), table.expand_as(values).gather(1, expected))


@AS_WRITTEN_AND_COMPILED
def test_ranks_of_non_finite_values_are_still_places(how):
    for size in (5, 36):
        values = features(size, ties=True)
        values[0, 1], values[1, 2], values[2, 3] = torch.nan, torch.inf, -torch.inf
        ranks = how(feature_ranks)(values)
        assert ranks.min() >= 0
        assert ranks.max() < size
    assert feature_ranks(torch.zeros(2, 0, 3)).shape == (2, 0, 3)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("size", [5, 36])
@pytest.mark.parametrize("knots", [5, 9])
def test_fspool_is_the_weighted_sum_of_the_sorted_features(knots, size, masked):
    torch.manual_seed(0)
    pool, elements = FSPool(4, set_size=knots).double(), features(size, ties=False)
    mask = torch.arange(size) < torch.tensor([[size], [3], [0]]) if masked else None
    present = torch.ones(3, size, dtype=torch.bool) if mask is None else mask.expand(3, -1)
    ranked = elements.masked_fill(~present.unsqueeze(-1), -torch.inf).sort(dim=1, descending=True).values
    ranked = ranked.masked_fill(~present.sort(dim=1, descending=True).values.unsqueeze(-1), 0.0)
    expected = (ranked * pool.weights(size, mask)).sum(1)
    torch.testing.assert_close(pool(elements, mask), expected, rtol=1e-12, atol=1e-12)


# --- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_pairs_are_encoded_as_if_they_were_written_out(masked):
    torch.manual_seed(0)
    inner = SetEncoder(FSPool(5, set_size=16), set_dim=6, hidden_dim=7).double()
    elements = torch.randn(2, 4, 3, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]]) if masked else None
    pairs = torch.cat([elements.repeat_interleave(4, dim=1), elements.repeat(1, 4, 1)], dim=-1)
    both = None if mask is None else mask.repeat_interleave(4, dim=1) & mask.repeat(1, 4)
    if masked:
        elements = elements.masked_fill(~mask.unsqueeze(-1), torch.nan)
    torch.testing.assert_close(PairwiseSetEncoder(inner)(elements, mask), inner(pairs, both))
    # encoders of other kinds see the pairs themselves
    torch.testing.assert_close(PairwiseSetEncoder(SumPool(6))(elements, mask), SumPool(6)(pairs, both))


# --- the complete descent -------------------------------------------------------------------------------------------

SMALL = Sizes(batch=3, set_size=5, set_dim=3, width=8, iterations=6)
SHAPE = {"set_size": SMALL.set_size, "set_dim": SMALL.set_dim}


@pytest.fixture
def quickly_compiled(monkeypatch):
    """Compile without C++: PyTorch runs the compiled graph."""
    torch.compiler.reset()
    step = torch.compile(compiled._step, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(compiled, "_compiled", lambda replayed: step)


@pytest.fixture
def double():
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(usual)


def assert_same(ours, theirs, *, tolerance=1e-11):
    """Compare in relative norm, tensor by tensor."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.usefixtures("quickly_compiled", "double")
@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_find_the_same_set_and_gradients(kind):
    found = {name: way() for name, way in ways_of(kind, SMALL).items()}
    assert len(found["plain"]) > 5
    assert_same(found["written"], found["plain"])
    assert_same(found["compiled"], found["plain"])


def decoders(objective, descent, differentiation=None, **arguments):
    return [IDSPN(objective, descent, differentiation, compile=c, **arguments).double().eval() for c in (False, True)]


VARIANTS = {
    "mask": {"mask": True},
    "condition": {"condition": True},
    "projection": {"descent": {"projection": Simplex(), "momentum": 0.5}},
    "no momentum": {"descent": {"clip": 0.1}},
    "learned": {"descent": {"momentum": 0.5, "learned": True}},
    "another solver": {"differentiation": Implicit(Neumann(terms=2))},
    "truncated": {"differentiation": Unrolled(last=2), "descent": {"momentum": 0.9}},
    "unrolled": {"differentiation": Unrolled(), "descent": {"momentum": 0.9}},
}


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_compiled_descents_equal_plain_ones(variant):
    torch.manual_seed(0)
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]]) if "mask" in variant else None
    condition = torch.randn(3, 4, 2, dtype=torch.float64) if "condition" in variant else None
    encoder = SetEncoder(FSPool(8, set_size=4), set_dim=3 if condition is None else 5, hidden_dim=8)
    matching = LatentMatching(encoder) if condition is None else Conditioned(LatentMatching(encoder))
    objective = Sum([matching, Proximity(weight=0.2)])
    descent = GradientDescent(iterations=5, **variant.get("descent", {}))
    latent = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for decoder in decoders(objective, descent, variant.get("differentiation"), set_size=4, set_dim=3):
        elements = decoder(latent, mask=mask, condition=condition)
        parameters = [latent, *decoder.parameters()]
        gradients = torch.autograd.grad(elements.square().sum(), parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            predicted = decoder(latent, mask=mask, condition=condition)
        found.append((elements, *gradients, predicted))
    assert_same(found[1], found[0])


def traceable(kind, differentiation=None):
    """A decoder whose start is no random number on the host."""
    torch.manual_seed(0)
    start = LearnedStart(SMALL.set_size, SMALL.set_dim)
    descent = GradientDescent(iterations=4, momentum=0.9, clip=1.0)
    return IDSPN(objective_of(kind, SMALL), descent, differentiation, start=start, **SHAPE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_descent_is_one_graph_of_a_compiled_model_in_full_precision(kind):
    decoder, latent = traceable(kind), torch.randn(SMALL.batch, SMALL.width)
    with torch.no_grad():
        expected = decoder(latent)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(traced(decoder)(latent), expected)


@pytest.mark.parametrize("differentiation", [Implicit(), Unrolled(last=2)], ids=["implicit", "truncated"])
def test_a_compiled_model_has_the_gradients_of_the_plain_one(differentiation):
    """Steps without gradients carry none in one graph either."""
    decoder = traceable("fspool", differentiation).double()
    latent, found = normal(SMALL.batch, SMALL.width).requires_grad_(), []
    for model in (decoder, torch.compile(decoder, backend="eager")):
        elements = model(latent)
        wanted = [latent, *decoder.objective.parameters()]
        found.append([elements, *torch.autograd.grad(elements.square().sum(), wanted)])
    assert_same(found[1], found[0])


@pytest.mark.usefixtures("quickly_compiled")
def test_many_batch_sizes_and_both_modes_are_compiled(recwarn):
    """More than torch's limit, by default eight; a warning would report the fallback."""
    torch.manual_seed(0)
    plain, other = decoders(objective_of("fspool", SMALL), GradientDescent(iterations=2, momentum=0.9), **SHAPE)
    with compiled.dynamo.patch(recompile_limit=2):
        for batch in range(1, 5):
            latent = normal(batch, SMALL.width)
            with torch.set_grad_enabled(batch % 2 == 0):
                assert_same(other(latent), plain(latent))
    assert not [warning for warning in recwarn if "uncompiled" in str(warning.message)]


class Untraceable(nn.Module):
    """An objective that reads numbers, which a graph cannot."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, elements, problem):
        assert elements.detach().sum().item() == elements.detach().sum().item()
        return self.scale * (elements - problem.latent.unsqueeze(1)).square().sum((1, 2))


def test_an_uncompilable_objective_runs_uncompiled_after_one_warning(recwarn):
    latent = torch.randn(2, 3, dtype=torch.float64)
    plain, other = decoders(Untraceable(), GradientDescent(iterations=3, learning_rate=0.1), set_size=4, set_dim=3)
    expected = plain(latent)
    for _ in range(2):
        torch.testing.assert_close(other(latent), expected)
    assert len([warning for warning in recwarn if "uncompiled" in str(warning.message)]) == 1


def test_errors_of_a_problem_are_raised_as_they_are(quickly_compiled):
    encoder = SetEncoder(FSPool(8, set_size=4), set_dim=3, hidden_dim=8)
    plain, decoder = decoders(LatentMatching(encoder), GradientDescent(iterations=3), set_size=4, set_dim=2)
    with pytest.raises(ValueError, match=r"elements \[batch, set_size, 3\]"):
        decoder(normal(2, 8))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        decoder(normal(2, 8))
    # compiling adds no weight
    assert plain.state_dict().keys() == decoder.state_dict().keys()
    copy.deepcopy(decoder).load_state_dict(plain.state_dict())


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_compiled_to_machine_code(recwarn):
    torch.compiler.reset()
    ways = ways_of("fspool", replace(SMALL, set_size=3))
    assert_same(ways["compiled"](), ways["plain"](), tolerance=1e-4)
    assert not [w for w in recwarn if "uncompiled" in str(w.message)]
