"""Attention, AttSets, monoid, orbits, frames and superset pooling: twins, known answers and what each paper claims.

The laws they share with all aggregators are in test_aggregators.py.
"""

import lightning.pytorch as pl
import pytest
import torch

from setpred.aggregators import (
    AttentionPool,
    AttSets,
    CanonicalOrder,
    FrameAverage,
    FSPool,
    LearnableMonoid,
    MaxPool,
    MeanPool,
    OrbitPool,
    SetEncoder,
    SumPool,
    SupersetPool,
)
from setpred.aggregators.frame_averaging import Eigenvectors
from setpred.decoders import IDSPN
from setpred.errors import InputError
from setpred.inner import Conditioned, GradientDescent, Implicit, LatentMatching, Problem
from setpred.training.faset import FASet

DIM, SIZE = 6, 5
# name to (constructor, whether equal elements can get unequal gradients)
RIVALS = {
    "attention": (lambda: AttentionPool(DIM, seeds=2, heads=2), False),
    "attsets": (lambda: AttSets(DIM), False),
    "monoid": (lambda: LearnableMonoid(DIM), True),
    "monoid in canonical order": (lambda: CanonicalOrder(LearnableMonoid(DIM)), True),
    "frames": (lambda: FrameAverage(FSPool(DIM, set_size=SIZE)), True),
    "orbits": (lambda: OrbitPool(DIM, orbits=4), False),
    "superset": (lambda: SupersetPool(DIM), False),
}

# name to (position_dim, whether reflections are frames too)
GROUPS = {"O(2)": (2, True), "SO(2)": (2, False), "O(3)": (3, True), "SO(3)": (3, False)}


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
    decoder(latent).square().sum().backward()
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


# --- AttSets ---


def test_attsets_is_a_softmax_by_hand():
    pool = AttSets(2)
    with torch.no_grad():
        pool.attention.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    elements = torch.tensor([[[0.0, 4.0], [2.0, 1.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    ahead = 2 / (1 + torch.tensor(-2.0).exp())  # (0·e⁰ + 2·e²) / (e⁰ + e²); the second feature is a mean
    torch.testing.assert_close(pool(elements, mask), torch.stack([ahead, torch.tensor(2.5)]).unsqueeze(0))


def test_attsets_without_attention_is_a_mean():
    pool = AttSets(DIM).double()
    torch.nn.init.zeros_(pool.attention.weight)
    mask = torch.tensor([True, False, True, True, False]).expand(3, -1)
    torch.testing.assert_close(pool(random_set(), mask), MeanPool(DIM)(random_set(), mask))


def test_single_elements_pass_unchanged_and_teach_the_attention_nothing():
    pool = scramble(AttSets(DIM))
    elements = random_set(size=1).requires_grad_()
    out = pool(elements)
    torch.testing.assert_close(out, elements.squeeze(1))
    out.square().sum().backward()
    assert (pool.attention.weight.grad == 0).all()
    torch.testing.assert_close(elements.grad.squeeze(1), 2 * out.detach())


def test_single_stage_draws_one_present_element_while_training_only():
    pool = scramble(AttSets(DIM))
    elements = random_set(batch=1).expand(200, -1, -1)
    mask = torch.tensor([True, False, True, True, False]).expand(200, -1).clone()
    mask[0] = False
    whole = pool(elements, mask)
    pool.single = True
    torch.manual_seed(0)
    drawn = pool(elements, mask)
    assert (drawn[0] == 0).all()
    which = (drawn[1:].unsqueeze(1) == elements[1:]).all(-1)
    assert (which.sum(1) == 1).all()
    assert which.any(0).tolist() == [True, False, True, True, False]
    torch.testing.assert_close(pool.eval()(elements, mask), whole)


class MedianOfSets(pl.LightningModule):
    """A model of input sets, small enough to train in a test; it notes what its attention pooled."""

    def __init__(self):
        super().__init__()
        self.encoder = SetEncoder(AttSets(4), set_dim=2, hidden_dim=4)
        self.head = torch.nn.Linear(4, 2)
        self.fixed = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
        self.seen = []

    def training_step(self, batch, batch_idx):
        pool = self.encoder.aggregator
        parameters = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        self.seen.append((self.current_epoch, pool.single, parameters))
        return (self.head(self.encoder(batch)) + self.fixed - batch.median(1).values).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)


def fit(model, epochs, **arguments):
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FASet(**arguments)],
    )
    trainer.fit(model, torch.utils.data.DataLoader(random_set(16, dim=2, dtype=torch.float32), batch_size=8))


def test_faset_trains_the_rest_on_single_elements_and_then_the_attention_alone():
    torch.manual_seed(0)
    model = MedianOfSets()
    fit(model, epochs=4, single_epochs=2)
    assert [(epoch, single) for epoch, single, _ in model.seen[::2]] == [(0, True), (1, True), (2, False), (3, False)]
    start, half = (next(values for epoch, _, values in model.seen if epoch == e) for e in (0, 2))
    end = dict(model.named_parameters())
    for name in start:
        first, second = (not torch.equal(a[name], b[name]) for a, b in ((start, half), (half, end)))
        attention = name == "encoder.aggregator.attention.weight"
        assert (first, second) == ((False, False) if name == "fixed" else (not attention, attention)), name
    assert all(parameter.requires_grad for name, parameter in end.items() if name != "fixed")
    assert not model.encoder.aggregator.single
    assert not model.fixed.requires_grad


def test_faset_needs_attsets():
    model = MedianOfSets()
    model.encoder = SetEncoder(SumPool(4), set_dim=2, hidden_dim=4)
    with pytest.raises(InputError, match="has none"):
        fit(model, epochs=1, single_epochs=1)


# --- learnable commutative monoid ---


class Plus(torch.nn.Module):
    def forward(self, first, second):
        return first + second


class Larger(torch.nn.Module):
    def forward(self, first, second):
        return torch.maximum(first, second)


class LeftMinusRight(torch.nn.Module):
    def forward(self, first, second):
        return first - 0.5 * second


def tree_twin(pool, elements):
    """The tree by recursion, of one set `[n, dim]`: neighbours in pairs, one left over passes up."""
    if len(elements) == 1:
        return elements[0]
    pairs = zip(elements[0::2], elements[1::2], strict=False)
    above = [0.5 * (pool.operation(a[None], b[None]) + pool.operation(b[None], a[None]))[0] for a, b in pairs]
    return tree_twin(pool, above + list(elements[len(elements) // 2 * 2 :]))


def monoid(operation=None, dim=DIM):
    torch.manual_seed(0)
    return LearnableMonoid(dim, operation=operation).double()


@pytest.mark.parametrize("size", range(1, 10))
def test_monoid_is_its_tree_wherever_the_elements_lie(size):
    pool, elements = monoid(), random_set(size=size)
    expected = torch.stack([tree_twin(pool, each) for each in elements])
    torch.testing.assert_close(pool(elements), expected)
    places = torch.randperm(size + 4, generator=torch.Generator().manual_seed(size))[:size].sort().values
    padded, mask = torch.full((3, size + 4, DIM), torch.nan, dtype=torch.float64), torch.zeros(3, size + 4).bool()
    padded[:, places], mask[:, places] = elements, True
    torch.testing.assert_close(pool(padded, mask), expected)


def test_monoid_of_known_operations_is_the_known_pooling():
    elements, mask = random_set(), torch.tensor([True, False, True, True, True]).expand(3, -1)
    for operation, known in ((Plus(), SumPool(DIM)), (Larger(), MaxPool(DIM))):
        pool = LearnableMonoid(DIM, operation=operation)
        torch.testing.assert_close(pool(elements, mask), known(elements, mask))
        torch.testing.assert_close(pool.associator(elements), torch.zeros(3, dtype=torch.float64))


def test_monoid_commutes_and_is_not_associative_until_it_learns():
    pool = monoid()
    a, b, c = random_set().unbind(1)[:3]
    torch.testing.assert_close(pool.combine(a, b), pool.combine(b, a))
    gap = pool.combine(pool.combine(a, b), c) - pool.combine(a, pool.combine(b, c))
    torch.testing.assert_close(pool.associator(torch.stack([a, b, c], dim=1)), gap.square().mean(-1))
    assert (gap.abs().amax(-1) > 0.01).all()


def test_associator_is_the_mean_over_triples_of_present_neighbours():
    pool = monoid(LeftMinusRight(), dim=1)  # a ⊕ b = (a + b) / 4, so the gap of a triple is (3 / 16) (c - a)
    elements = torch.tensor([[5.0, 1.0, 9.0, 2.0, 4.0]], dtype=torch.float64).unsqueeze(-1)
    mask = torch.tensor([[True, False, True, True, True]])
    expected = torch.tensor([((2 - 5) ** 2 + (4 - 9) ** 2) / 2 * (3 / 16) ** 2], dtype=torch.float64)
    torch.testing.assert_close(pool.associator(elements, mask), expected)
    assert pool.associator(elements, mask & (elements[..., 0] > 4)).item() == 0
    assert pool.associator(elements[:, :1]).item() == 0


def test_siblings_and_branches_of_the_tree_swap_and_other_elements_do_not():
    pool, elements = monoid(), random_set(size=4)
    for order in ([1, 0, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0]):
        torch.testing.assert_close(pool(elements[:, order]), pool(elements))
    assert (pool(elements[:, [0, 2, 1, 3]]) - pool(elements)).abs().max() > 0.01


@torch.no_grad()
def order_dependence(pool, elements):
    """Variance of the result over orders of the elements, as a share of its variance over sets."""
    generator = torch.Generator().manual_seed(4)
    results = torch.stack([pool(elements[:, torch.randperm(4, generator=generator)]) for _ in range(5)])
    return (results - results.mean(0)).square().mean() / results.flatten(0, 1).var(0).mean()


def test_a_monoid_that_learns_a_maximum_becomes_associative():
    pool = monoid(dim=2)
    unseen = random_set(batch=200, size=4, dim=2, seed=0)
    before = pool.associator(unseen).mean(), order_dependence(pool, unseen)
    optimizer = torch.optim.Adam(pool.parameters(), 0.02)
    for step in range(100):
        elements = random_set(batch=64, size=4, dim=2, seed=100 + step)
        loss = (pool(elements) - elements.amax(1)).square().mean() + pool.associator(elements).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = pool.associator(unseen).mean(), order_dependence(pool, unseen)
    assert after[0] < 0.5 * before[0]
    assert after[1] < before[1]


def test_canonical_order_makes_any_sequence_function_a_set_function():
    pool = CanonicalOrder(monoid())
    elements = random_set(size=4).double()
    torch.testing.assert_close(pool(elements[:, [0, 2, 1, 3]]), pool(elements), rtol=0, atol=0)
    ranked = elements.gather(1, (elements @ pool.direction.double()).argsort(1, True)[..., None].expand_as(elements))
    torch.testing.assert_close(pool(elements), pool.aggregator(ranked))


# --- frames ---


def moved(elements, position_dim, *, reflect=False, shift=True, seed=11):
    """The sets with their positions turned at random, and reflected and shifted if asked for."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(elements), position_dim, position_dim)
    turn = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
    wrong = torch.linalg.det(turn).sign() != (-1 if reflect else 1)
    turn[wrong, :, 0] *= -1
    shifts = 5 * torch.randn(len(elements), 1, position_dim, generator=generator, dtype=torch.float64) * shift
    positions, features = elements.split([position_dim, elements.shape[-1] - position_dim], dim=-1)
    return torch.cat([(positions.double() @ turn.mT + shifts).to(features.dtype), features], dim=-1)


def frame_average(group, pool=None):
    position_dim, reflections = GROUPS[group]
    torch.manual_seed(0)
    inner = SetEncoder(FSPool(4, set_size=8), set_dim=DIM, hidden_dim=16) if pool is None else pool
    return FrameAverage(inner, position_dim=position_dim, reflections=reflections)


@pytest.mark.parametrize("group", GROUPS)
def test_frame_average_does_not_see_rotations_translations_and_order(group):
    pool = frame_average(group)
    elements = random_set(batch=50, size=8, dtype=torch.float32)
    mask = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)) < 0.8
    other = moved(elements, GROUPS[group][0])[:, torch.randperm(8, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(pool(other), pool(elements), rtol=0, atol=1e-5)
    torch.testing.assert_close(pool(moved(elements, pool.position_dim), mask), pool(elements, mask), rtol=0, atol=1e-5)
    # what is wrapped does see them
    assert (pool.aggregator(moved(elements, pool.position_dim, shift=False)) - pool.aggregator(elements)).std() > 0.01


@pytest.mark.parametrize("group", GROUPS)
def test_frame_average_sees_handedness_unless_reflections_are_frames(group):
    pool, elements = frame_average(group).double(), random_set(size=8)
    difference = pool(moved(elements, pool.position_dim, reflect=True)) - pool(elements)
    assert (difference.abs().amax(1) < 1e-9).all() if pool.reflections else (difference.abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
def test_frame_average_of_few_elements_that_do_not_span_the_space(group, size):
    pool, elements = frame_average(group).double(), random_set(size=size)
    torch.testing.assert_close(pool(moved(elements, 3)), pool(elements), rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(pool, elements.requires_grad_())


def test_frame_average_of_known_functions():
    # features pass, positions are centred
    elements = random_set()
    pooled = FrameAverage(MeanPool(DIM), position_dim=2)(elements)
    torch.testing.assert_close(pooled[:, :2], torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(pooled[:, 2:], elements[..., 2:].mean(1))
    # the ends of a stick of length 2 lie at ±1 on its long axis, the last one, wherever the stick is
    stick = torch.tensor([[[3.0, 4.0], [3.0 + 2 * 0.6, 4.0 + 2 * 0.8]]])
    torch.testing.assert_close(FrameAverage(MaxPool(2), position_dim=2)(stick), torch.tensor([[0.0, 1.0]]))
    assert [len(frame_average(group).signs) for group in GROUPS] == [4, 2, 8, 4]
    _, frames = frame_average("SO(3)").double().frames(elements[..., :3], None)
    torch.testing.assert_close(torch.linalg.det(frames), torch.ones(3, 4, dtype=torch.float64))


def test_frame_average_of_symmetric_sets_has_finite_gradients():
    square = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]], dtype=torch.float64)
    point = torch.ones(1, 4, 2, dtype=torch.float64)
    pool = frame_average("O(2)", SetEncoder(FSPool(4, set_size=4), set_dim=2, hidden_dim=8)).double()
    for elements in (square, point):
        leaf = elements.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(pool(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(second).all()


def test_eigenvectors_have_the_gradients_of_torchs():
    root = random_set(batch=2, size=3, dim=3)
    weights = random_set(batch=2, size=3, dim=3, seed=2)

    def ours(root):
        return (weights * Eigenvectors.apply(root @ root.mT) ** 2).sum((1, 2))

    def theirs(root):
        return (weights * torch.linalg.eigh(root @ root.mT).eigenvectors ** 2).sum((1, 2))

    values = []
    for function in (ours, theirs):
        leaf = root.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first**3).sum(), leaf, create_graph=True)
        (third,) = torch.autograd.grad((second**3).sum(), leaf)
        values.append((first, second, third))
    for mine, other in zip(*values, strict=True):
        torch.testing.assert_close(mine, other)
    assert torch.autograd.gradgradcheck(ours, root.clone().requires_grad_())


# --- orbits ---


@pytest.mark.parametrize("position_dim", [2, 3])
def test_orbits_do_not_turn(position_dim):
    pool = scramble(OrbitPool(DIM, position_dim=position_dim, orbits=6, largest=2.0))
    elements, mask = random_set(), torch.tensor([True, False, True, True, True]).expand(3, -1)
    for reflect in (False, True):
        other = moved(elements, position_dim, reflect=reflect)
        torch.testing.assert_close(pool.orbit(other, mask)[mask], pool.orbit(elements, mask)[mask])
        torch.testing.assert_close(pool(other, mask), pool(elements, mask))
    fixed = scramble(OrbitPool(DIM, position_dim=position_dim, orbits=6, largest=2.0, centred=False))
    torch.testing.assert_close(fixed(moved(elements, position_dim, shift=False)), fixed(elements))
    assert not torch.allclose(fixed(moved(elements, position_dim)), fixed(elements))
    single = pool.float()(elements.float())
    torch.testing.assert_close(pool(moved(elements.float(), position_dim)), single, rtol=0, atol=1e-5)


def test_a_set_encoder_that_keeps_positions_keeps_the_invariance():
    torch.manual_seed(0)
    elements = random_set()
    pools = [SetEncoder(OrbitPool(8, orbits=6), set_dim=DIM, hidden_dim=8, kept=kept).double() for kept in (3, 0)]
    same, other = (torch.allclose(pool(moved(elements, 3)), pool(elements)) for pool in pools)
    assert same
    assert not other
    with pytest.raises(InputError, match="kept to leave some of 3 numbers"):
        SetEncoder(OrbitPool(8), set_dim=3, kept=3)


def orbit_twin(pool, elements):
    """One set in loops over its orbits and elements, centred at the origin."""
    out = 0
    for k, q in enumerate(pool.radii):
        pooled, nobody = 0, 1
        for element in elements:
            radius = (element[:2].square().sum() + (0.1 * pool.spacing) ** 2).sqrt()
            closeness = [torch.exp(-0.5 * ((radius - other) / pool.spacing) ** 2) for other in pool.radii]
            share = closeness[k] / sum(closeness)
            pooled, nobody = pooled + share * element[2:], nobody * (1 - share)
        changed = pool.network(torch.cat([pooled, q[None]]))
        out = out + pool.weight[k] * (pool.skip(pooled) + (1 - nobody) * changed)
    return out / len(elements)


def test_orbit_pooling_is_its_twin():
    pool = scramble(OrbitPool(DIM, position_dim=2, out_dim=3, orbits=4, largest=2.0, centred=False))
    expected = torch.stack([orbit_twin(pool, each) for each in random_set()])
    torch.testing.assert_close(pool(random_set()), expected)


def test_orbit_pooling_starts_as_the_mean():
    torch.manual_seed(0)
    elements, mask = random_set(), torch.tensor([True, False, True, True, True]).expand(3, -1)
    pool = OrbitPool(DIM, position_dim=2).double()
    torch.testing.assert_close(pool(elements, mask), MeanPool(DIM)(elements, mask)[:, 2:])
    # positions alone count the elements
    torch.testing.assert_close(OrbitPool(2, position_dim=2).double()(elements[..., :2]), torch.ones(3, 1).double())


def test_orbit_pooling_tells_radii_apart_and_learns_where_to_put_them():
    """Positions have gradients along the radius and none around it; at the centre they are finite."""
    pool = scramble(OrbitPool(2, position_dim=2, orbits=5, largest=2.0, centred=False))
    positions = random_set(dim=2)
    positions[0, 0] = 0.0
    leaf = positions.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pool(leaf).sum(), leaf, create_graph=True)
    along = (gradient * leaf).sum(-1)
    around = gradient[..., 0] * leaf[..., 1] - gradient[..., 1] * leaf[..., 0]
    assert (along[1:].abs() > 1e-6).all()
    torch.testing.assert_close(around, torch.zeros_like(around), rtol=0, atol=1e-12)
    (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
    assert torch.isfinite(second).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FrameAverage(SumPool(2), position_dim=3), "position_dim from 1 to the 2"),
        (lambda: OrbitPool(2, position_dim=3), "3 of 2"),
        (lambda: OrbitPool(4, orbits=1), "at least 2 orbits"),
        (lambda: OrbitPool(4, largest=0.0), "positive largest"),
    ],
)
def test_positions_that_cannot_be_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()


# --- superset ---


def test_superset_pooling_is_two_sums():
    pool = SupersetPool(3, out_dim=2)
    with torch.no_grad():
        pool.subset.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        pool.superset.weight.copy_(torch.tensor([[0.0, 10.0], [0.0, 0.0]]))
        pool.subset.bias.copy_(torch.tensor([0.5, 0.0]))
    elements = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 5.0, 7.0], [1.0, 4.0, -2.0], [1.0, 90.0, 90.0]]])
    mask = torch.tensor([[True, True, True, False]])
    # S = {(2, 3), (4, -2)}, V = S with (5, 7): (2 + 4 + 10 (3 + 7 - 2) + 0.5, 3 - 2)
    expected = torch.nn.functional.silu(torch.tensor([[86.5, 1.0]]))
    torch.testing.assert_close(pool(elements, mask), expected)


def test_superset_pooling_knows_where_a_subset_comes_from():
    """The same subset in another superset differs, other elements' order and that of padding do not matter."""
    pool, features = scramble(SupersetPool(DIM)), random_set(batch=1, dim=DIM - 1)
    member = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64).view(1, SIZE, 1)
    elements = torch.cat([member, features], dim=-1)
    mask = torch.tensor([[True, True, True, False, False]])
    assert not torch.allclose(pool(elements, mask), pool(elements))
    torch.testing.assert_close(pool(elements[:, [0, 1, 4, 3, 2]]), pool(elements))
    torch.testing.assert_close(pool(elements[:, [1, 0, 2, 3, 4]]), pool(elements))
    # no subset, in a superset that is there, is not nothing
    empty = torch.cat([0 * member, features], dim=-1)
    assert (pool(empty) != 0).all()


def test_a_subset_is_found_by_descent_on_its_memberships():
    """z is the encoding of a subset; the memberships that fit it best are those of the subset."""
    encoder = scramble(SetEncoder(SupersetPool(17), set_dim=4, hidden_dim=16, kept=1))
    features = random_set(batch=4, size=4, dim=3)
    wanted = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).double().unsqueeze(-1)
    latent = encoder(torch.cat([wanted, features], dim=-1)).detach()
    decoder = IDSPN(
        Conditioned(LatentMatching(encoder)),
        GradientDescent(iterations=600, learning_rate=0.1, momentum=0.9, clip=1.0),
        set_size=4,
        set_dim=1,
    )
    found = decoder(latent, condition=features).detach()
    assert ((found > 0.5) == (wanted > 0.5)).all()


def test_a_superset_needs_features():
    with pytest.raises(InputError, match="at least one more number"):
        SupersetPool(1)
