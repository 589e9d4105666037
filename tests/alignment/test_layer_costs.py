"""Layer costs against their definitions, through `align`, and against the paper's own numbers."""

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxfuse
from fxfuse.alignment.aligners import Monotone
from fxfuse.alignment.layer_costs import (
    LinearCKA,
    Meter,
    OfActivations,
    Wasserstein,
    WeightDistributions,
    gram,
    linear_cka,
    neuron_counts,
    weight_distributions,
)
from fxfuse.errors import ArgumentError, DataError
from fxfuse.ir import Layer
from fxfuse.solvers import Solver
from tests.support.nets import Tokens, mlp, randomise, stages
from tests.support.references import direct_cka
from tests.support.sweeps import crossed, some
from tests.support.tolerances import STATISTIC
from tests.support.trained import FOLDER, mnist, needs_networks, parents

seeds = st.integers(0, 999)


def activations(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.7


def layer(width=1, kind="linear", name="a layer"):
    nodes = {"nodes": ("n",), "entry": "x", "merge": "n", "pre_activation": "n"}
    form = {"producers": ("n",), "branched": False, "resolution": (), "layout": (2, 1)}
    return Layer(name, kind, width=width, **nodes, **form)


def measured(cost, left, right, batch=None):
    """Costs of two lists of layers, given by their activations, in batches or at once."""
    sides = [[layer(x.shape[1]) for x in layers] for layers in (left, right)]
    meter = cost(*sides)
    size = batch or len(left[0])
    for i in range(0, len(left[0]), size):
        meter.add(*([meter.reduce(x[i : i + size]) for x in layers] for layers in (left, right)))
    return meter.costs()


# --- linear CKA -----------------------------------------------------------------------------------


def cka(left, right, **options):
    return measured(LinearCKA(**options), left, right)


def test_a_gram_matrix_is_that_of_centred_samples():
    x = activations(0, 5, 3, 2, 2)
    flat = x.flatten(1).double()
    flat = flat - flat.mean(0)
    assert torch.allclose(gram(x), flat @ flat.T, rtol=STATISTIC, atol=STATISTIC)
    assert gram(x).dtype == torch.float64
    assert float(gram(x).sum(0).abs().max()) < STATISTIC


@given(seeds)
def test_costs_of_layers_are_one_minus_linear_cka(seed):
    left = [activations(seed + i, 7, 3 + i, 2) for i in range(3)]
    right = [activations(seed + 10 + i, 7, 4, 1 + i) for i in range(2)]
    expected = np.array([[direct_cka(x, y) for y in right] for x in left])
    assert np.abs(cka(left, right) - expected).max() <= STATISTIC


@given(seeds)
def test_cka_of_several_batches_adds_their_inner_products(seed):
    batches = [(activations(seed + i, 6, 4), activations(seed + 50 + i, 6, 3)) for i in range(3)]
    x, y = ([torch.cat(parts)] for parts in zip(*batches))
    cost = measured(linear_cka, x, y, batch=6)[0, 0]
    grams = [(gram(x).numpy(), gram(y).numpy()) for x, y in batches]
    cross = sum((k * m).sum() for k, m in grams)
    squares = sum((k * k).sum() for k, _ in grams) * sum((m * m).sum() for _, m in grams)
    assert cost == pytest.approx(1 - cross / squares**0.5, rel=STATISTIC)


@given(seeds)
def test_cka_does_not_depend_on_the_order_scale_or_rotation_of_units(seed):
    x, y = activations(seed, 9, 5), activations(seed + 1, 9, 6)
    rng = np.random.default_rng(seed)
    rotation = torch.as_tensor(np.linalg.qr(rng.standard_normal((5, 5)))[0], dtype=torch.float32)
    changed = [x, x[:, rng.permutation(5)], 3 * x, x @ rotation, x + 5]
    costs = cka(changed, [y])
    assert np.abs(costs - costs[0]).max() <= STATISTIC
    assert np.abs(cka([x], changed)).max() <= STATISTIC


def test_cka_tells_layers_apart():
    x, y = activations(0, 30, 5), activations(1, 30, 5)
    assert cka([x], [x + 0.1 * y])[0, 0] < 0.1 < 0.5 < cka([x], [y])[0, 0]
    assert cka([x], [x * torch.tensor([1.0, 5, 1, 1, 1])])[0, 0] > 0.01


def test_a_constant_layer_is_unlike_everything_even_itself():
    x, constant = activations(0, 5, 3), torch.ones(5, 3)
    assert np.array_equal(cka([constant], [x, constant]), [[1.0, 1.0]])


def direct_unbiased(x, y):
    """HSIC_1 from its formula, with the sums written out."""
    k, m = (t.flatten(1).double().numpy() @ t.flatten(1).double().numpy().T for t in (x, y))
    np.fill_diagonal(k, 0), np.fill_diagonal(m, 0)
    n, one = len(k), np.ones(len(k))
    products = np.trace(k @ m) - 2 * (one @ k @ m @ one) / (n - 2)
    means = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (products + means) / (n * (n - 3))


@given(seeds, st.integers(1, 3))
def test_unbiased_cka_is_the_ratio_of_means_over_batches(seed, batches):
    x, y = activations(seed, 6 * batches, 5, 2), activations(seed + 1, 6 * batches, 4)
    parts = list(zip(x.split(6), y.split(6)))
    over = sum(direct_unbiased(a, b) for a, b in parts)
    under = sum(direct_unbiased(a, a) for a, _ in parts) * sum(
        direct_unbiased(b, b) for _, b in parts
    )
    cost = measured(LinearCKA(unbiased=True), [x], [y], batch=6)[0, 0]
    assert cost == pytest.approx(1 - over / under**0.5, abs=STATISTIC)


def test_the_unbiased_estimate_does_not_grow_as_batches_shrink():
    x, y = activations(0, 400, 30), activations(1, 400, 30)
    small, large = (
        [1 - measured(LinearCKA(unbiased=u), [x], [y], batch=b)[0, 0] for b in (8, 400)]
        for u in (False, True)
    )
    assert small[0] > 0.5 > 5 * small[1], "independent layers look alike with few samples"
    assert max(map(abs, large)) < 0.1


def test_batches_of_fewer_than_four_samples_add_nothing():
    x, y = activations(0, 10, 5), activations(1, 10, 4)
    whole = measured(LinearCKA(unbiased=True), [x[:8]], [y[:8]])
    assert np.array_equal(measured(LinearCKA(unbiased=True), [x], [y], batch=8), whole)
    with pytest.raises(DataError, match="at most 3 samples"):
        measured(LinearCKA(unbiased=True), [x], [y], batch=3)


# --- Wasserstein distance -------------------------------------------------------------------------


def direct_wasserstein(x, y):
    """Exact transport between the stacked vectors of all units."""
    a, b = (t.transpose(0, 1).flatten(1).double().numpy() for t in (x, y))
    distance = np.linalg.norm(a[:, None] - b[None], axis=-1) / len(x) ** 0.5
    return ot.emd2([], [], distance)


@given(seeds, st.sampled_from([(), (3,), (2, 2)]))
def test_wasserstein_costs_are_those_of_the_stacked_vectors(seed, positions):
    left = [activations(seed + i, 9, 4 + i, *positions) for i in range(3)]
    right = [activations(seed + 10 + i, 9, 6 - i, *positions) for i in range(2)]
    expected = np.array([[direct_wasserstein(x, y) for y in right] for x in left])
    assert np.allclose(measured(Wasserstein(), left, right), expected, rtol=STATISTIC)


@given(seeds, st.integers(1, 8))
def test_wasserstein_costs_do_not_depend_on_batches(seed, batch):
    left = [activations(seed, 11, 5, 3), activations(seed + 1, 11, 4, 3)]
    right = [activations(seed + 2, 11, 6, 3)]
    whole = measured(Wasserstein(), left, right)
    assert np.allclose(measured(Wasserstein(), left, right, batch), whole, rtol=STATISTIC)


def test_wasserstein_depends_on_scale_but_not_on_the_order_or_copies_of_units():
    x = activations(0, 12, 5)
    same = measured(Wasserstein(), [x], [x[:, [3, 1, 0, 4, 2]], x.repeat(1, 2)])
    assert np.abs(same).max() <= 1e-3, "the root of a rounding error"
    assert measured(Wasserstein(), [x], [2 * x])[0, 0] > 0.5


def test_layers_that_never_pair_are_not_transported():
    meter = Wasserstein()([layer(kind="a"), layer(kind="b")], [layer(kind="b")])
    x = activations(0, 5, 1)
    meter.add([meter.reduce(x), meter.reduce(x)], [meter.reduce(x)])
    assert np.isinf(meter.costs()[0, 0]) and meter.costs()[1, 0] <= 1e-3


def test_the_solver_of_wasserstein_is_an_option():
    class Independent(Solver):
        def __call__(self, cost, a, b):
            return np.outer(a, b)

    x, y = activations(0, 12, 5), activations(1, 12, 4)
    distance = torch.cdist(x.T, y.T).numpy() / 12**0.5
    cost = measured(Wasserstein(solver=Independent()), [x], [y])[0, 0]
    assert cost == pytest.approx(distance.mean(), rel=STATISTIC)


# --- layers alone ---------------------------------------------------------------------------------


def test_neuron_counts_are_squared_differences():
    """The cost matrix of the paper's figure 2."""
    rows, columns = ([layer(n) for n in widths] for widths in ((5, 4, 3, 1), (3, 2, 1)))
    expected = [[4, 9, 16], [1, 4, 9], [0, 1, 4], [4, 1, 0]]
    assert np.array_equal(neuron_counts(rows, columns), expected)


def weighed(cost, left, right):
    """Costs of two lists of layers, given by their weights."""
    meter = cost([layer() for _ in left], [layer() for _ in right])
    assert meter.of_weights
    meter.add(*([meter.reduce(weights) for weights in side] for side in (left, right)))
    return meter.costs()


@given(seeds)
def test_weight_distributions_are_transported_exactly_with_one_quantile_per_weight(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((6, 7)), 2 * rng.standard_normal((2, 3, 7))
    cost = weighed(WeightDistributions(levels=42), [[a]], [[b]])[0, 0]
    assert cost == pytest.approx(ot.wasserstein_1d(a.ravel(), b.ravel()), rel=STATISTIC)


def test_weight_distributions_do_not_depend_on_the_order_or_number_of_units():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, 60))
    shuffled = a[rng.permutation(40)][:, rng.permutation(60)]
    others = [np.repeat(a, 2, 0), rng.standard_normal((80, 30)), 1.5 * a]
    layers = [[weight] for weight in (shuffled, *others)]
    same, doubled, alike, scaled = weighed(weight_distributions, [[a]], layers)[0]
    assert same == 0 and doubled < 5e-3 and alike < 0.1 < 0.3 < scaled


def test_several_weights_of_a_layer_make_one_distribution():
    a, b = np.arange(6.0).reshape(2, 3), np.arange(6.0, 10).reshape(2, 2)
    same, part = weighed(weight_distributions, [[a, b]], [[b, a], [a]])[0]
    assert same == 0 and part > 1


# --- a function of activations --------------------------------------------------------------------


def test_any_function_of_two_layers_activations_is_a_cost():
    seen = []

    def function(x, y):
        seen.append((tuple(x.shape), tuple(y.shape)))
        return (x.mean() - y.mean()).abs()

    left = [activations(i, 7, 3, 2) for i in range(2)]
    right = [activations(9, 7, 4, 2)]
    costs = measured(OfActivations(function, samples=5), left, right, batch=3)
    expected = [[abs(float(x[:5].mean() - right[0][:5].mean()))] for x in left]
    assert np.allclose(costs, expected, rtol=STATISTIC)
    assert seen == [((5, 3, 2), (5, 4, 2))] * 2


# --- through align --------------------------------------------------------------------------------

VECTORS, IMAGES = torch.randn(40, 6), torch.randn(24, 3, 8, 8)


COSTS = {
    "cka": linear_cka,
    "unbiased cka": LinearCKA(unbiased=True),
    "small batches": LinearCKA(batch=8),
    "wasserstein": Wasserstein(),
    "neurons": neuron_counts,
    "weights": weight_distributions,
    "function": OfActivations(lambda x, y: (x.std() - y.std()).abs()),
    "fewer samples": OfActivations(lambda x, y: (x.std() - y.std()).abs(), samples=9),
}


def costs_of(cost, nets, data, segment=0):
    alignment = fxfuse.align(nets, data, method=fxfuse.Method(layer_cost=cost))
    return np.array(alignment.segments[segment].costs[1])


def perceptrons():
    return [randomise(mlp(6, 9, 8, 7, 5, 3), 1), randomise(mlp(6, 5, 6, 3), 2)]


def convolutional():
    return [randomise(stages([6, 5, 4], [7]), 1), randomise(stages([3, 5], [4]), 2)]


MEASURED = {
    "convolutional": (convolutional, IMAGES, (3, 2)),
    "perceptrons": (perceptrons, VECTORS, (4, 2)),
}


@pytest.mark.parametrize(("kind", "cost"), crossed(MEASURED, COSTS))
def test_each_cost_measures_networks_of_unequal_widths(kind, cost):
    (nets, data, shape), cost = MEASURED[kind], COSTS[cost]
    costs = costs_of(cost, nets(), data)
    assert costs.shape == shape and np.isfinite(costs).all() and (costs >= -1e-6).all()
    fused = fxfuse.fuse(nets(), data, method=fxfuse.Method(Monotone(last=False), layer_cost=cost))
    segment = fused.meta["fxfuse"].alignment.segments[0]
    expected = Monotone(last=False)(costs)
    assert [i for i, name in enumerate(segment.slots[1]) if name] == expected
    assert np.allclose(segment.costs[1], costs)


def test_no_two_costs_are_the_same():
    costs = [costs_of(cost, perceptrons(), VECTORS) for cost in COSTS.values()]
    for i, a in enumerate(costs):
        assert not any(np.allclose(a, b, rtol=1e-3) for b in costs[:i])


def test_wasserstein_costs_of_networks_are_those_of_their_pre_activations():
    a, b = convolutional()
    one, other = (net[0][0] for net in (a, b))
    with torch.no_grad():
        expected = direct_wasserstein(one[1](one[0](IMAGES)), other[1](other[0](IMAGES)))
    assert costs_of(Wasserstein(), [a, b], IMAGES)[0, 0] == pytest.approx(expected, rel=STATISTIC)


def test_functions_get_units_along_the_second_axis_whatever_the_layout():
    seen = set()
    cost = OfActivations(lambda x, y: seen.add((x.shape, y.shape)) or 0.0, samples=10)
    nets = [randomise(Tokens(depth=2), 1), randomise(Tokens(width=6, depth=1), 2)]
    costs_of(cost, nets, IMAGES)
    assert ((10, 8, 5), (10, 6, 5)) in seen and ((10, 8, 2, 2), (10, 6, 2, 2)) in seen


class Unlike(Meter):
    """Finds all layers equally unlike; keeps what it is shown."""

    def __init__(self, rows, columns):
        self.shape, self.seen = (len(rows), len(columns)), []

    def add(self, rows, columns):
        self.seen.append((rows, columns))

    def costs(self):
        return np.zeros(self.shape)


def test_weights_are_shown_with_norms_folded_in():
    a, b = convolutional()
    meters = []

    class Weights(Unlike):
        of_weights = True

        def __init__(self, rows, columns):
            super().__init__(rows, columns)
            meters.append(self)

    costs_of(Weights, [a, b], IMAGES)
    conv, norm = a[0][0][0], a[0][0][1]
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    expected = (conv.weight * factor[:, None, None, None]).detach().numpy()
    ((rows, _),) = meters[0].seen
    assert np.allclose(rows[0][0], expected, rtol=1e-5)


def test_costs_from_the_layers_alone_run_no_data():
    ticks = []
    fxfuse.align(perceptrons(), VECTORS, progress=lambda *tick: ticks.append(tick))
    assert ("align layers", 1.0) in ticks
    for cost in (neuron_counts, weight_distributions):
        ticks.clear()
        method = fxfuse.Method(layer_cost=cost)
        fxfuse.align(perceptrons(), VECTORS, method=method, progress=lambda *t: ticks.append(t))
        assert ("align layers", 1.0) not in ticks


def test_batches_are_shown_until_the_meter_has_seen_enough():
    sizes = []

    class Counting(Unlike):
        samples = 300

        def add(self, rows, columns):
            sizes.append(len(rows[0]))

    nets = [randomise(mlp(6, *[8] * depth, 3, bias=False), depth) for depth in (3, 2)]
    fxfuse.align(nets, torch.randn(1000, 6), method=fxfuse.Method(layer_cost=Counting))
    assert sizes == [256] * 4, "two segments, two batches"


def test_cka_reads_only_as_many_samples_as_it_is_told_to():
    nets = perceptrons()
    changed, every = VECTORS.clone(), LinearCKA(batch=8, samples=len(VECTORS))
    changed[16:] += 1.0  # beyond the samples
    few = LinearCKA(batch=8, samples=16)
    assert np.array_equal(costs_of(few, nets, VECTORS), costs_of(few, nets, changed))
    assert not np.allclose(costs_of(few, nets, VECTORS), costs_of(every, nets, VECTORS))


@pytest.mark.parametrize(
    ("cost", "fault"),
    [
        (lambda rows, columns: np.zeros((1, 1)), r"shape \(1, 1\)"),
        (lambda rows, columns: np.full((4, 2), np.nan), "8 of them NaN"),
        (OfActivations(lambda x, y: float("nan")), "8 of them NaN"),
    ],
)
def test_costs_of_another_shape_and_costs_that_are_nan_are_refused(cost, fault):
    with pytest.raises(ArgumentError, match=fault) as caught:
        costs_of(cost, perceptrons(), VECTORS)
    assert caught.value.where.startswith("the layer cost")


# --- what the paper's own code gives --------------------------------------------------------------

BY_CKA = [
    [0.0363, 0.1720, 0.3447],
    [0.2817, 0.1221, 0.1270],
    [0.4506, 0.2419, 0.1926],
    [0.4854, 0.2849, 0.2423],
    [0.4738, 0.2718, 0.2256],
]


BY_TRANSPORT = [
    [0.9425, 1.2408, 1.8557],
    [0.8952, 0.6956, 1.3437],
    [1.2778, 0.8188, 1.0086],
    [2.7120, 2.3015, 1.9178],
    [5.5837, 5.3493, 4.9248],
]


BY_NEURONS = np.subtract.outer([400, 200, 100, 50, 25], [400, 200, 100]) ** 2


@needs_networks
@pytest.mark.parametrize("seed", some([0, 1, 2], 0, 2))
@pytest.mark.parametrize(
    ("cost", "table"),
    [(neuron_counts, BY_NEURONS), (linear_cka, BY_CKA), (Wasserstein(), BY_TRANSPORT)],
    ids=["neurons", "cka", "wasserstein"],
)
def test_table_9_of_the_paper(cost, table, seed):
    chosen = np.load(FOLDER / "samples_and_splits.npz")["depth_samples"]
    samples = mnist(True)[0][torch.from_numpy(chosen)]
    costs = costs_of(cost, parents(seed), samples)
    if seed == 0:
        assert np.abs(costs - table).max() <= 1e-3
    free = [0, 1, 3] if cost is linear_cka and seed == 2 else [0, 1, 2]
    maps = {(f, t): Monotone(f, t)(costs) for f in (True, False) for t in (True, False)}
    assert maps == {
        (True, True): [0, 1, 4],
        (False, True): [0, 1, 4],
        (True, False): free,
        (False, False): free,
    }
