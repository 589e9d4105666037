"""The entry functions, end to end: what must come back exactly, and what must be refused."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.alignment.layer_costs import OfActivations
from fxfuse.coupling.c2m3 import CycleConsistent
from fxfuse.coupling.measure import View
from fxfuse.coupling.transport import Transport
from fxfuse.coupling.weight_matching import MergeMany, WeightMatching
from fxfuse.coupling.zipit import Zip
from fxfuse.depth import sign_of_sum
from fxfuse.depth.shorten import Shorten
from fxfuse.errors import (
    ArgumentError,
    DataError,
    FuseError,
    ModelError,
    PairingError,
    PassError,
    SolverError,
    TraceError,
)
from fxfuse.refit.moments import AsMixed, MatchMoments
from fxfuse.refit.sweep import LeastSquares
from fxfuse.solvers import Assignment, Sinkhorn, UnbalancedSinkhorn
from tests.support.nets import (
    NETS,
    Grown,
    Pooled,
    Tokens,
    build,
    conv,
    gap,
    mlp,
    moved,
    outputs,
    random_nets,
    randomise,
    residual,
    stages,
)
from tests.support.sweeps import crossed, some
from tests.support.tolerances import FUNCTION
from tests.support.widening import widened


def images(count=48, seed=5):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def data_for(name, count=48):
    shape = NETS[name].shape[1:]
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(7))


# --- what comes back exactly ----------------------------------------------------------------------


@pytest.mark.parametrize("name", some(NETS, *[*NETS][::2]))
def test_a_network_fused_with_its_permuted_copy_computes_what_it_computes(name):
    net, x = build(name)
    data = data_for(name)
    fused = fxfuse.fuse([net, fxfuse.permute(net, x, seed=3)], data)
    assert gap(net, fused, data) < FUNCTION


@settings(max_examples=6)
@given(random_nets(), st.integers(0, 100))
def test_random_networks_fused_with_permuted_copies_come_back(net, seed):
    data = images()
    if float(outputs(net, data).abs().max()) < 0.01:
        return
    fused = fxfuse.fuse([net, fxfuse.permute(net, data[:2], seed=seed)], data)
    assert gap(net, fused, data) < FUNCTION


def test_a_network_fused_with_itself_is_itself_weight_for_weight():
    net = randomise(mlp(6, 8, 7, 3))
    fused = fxfuse.fuse([net, net], torch.randn(40, 6))
    for name, value in net.state_dict().items():
        assert torch.allclose(fused.state_dict()[name], value, rtol=1e-5, atol=1e-6), name


def test_three_permuted_copies_come_back_in_any_anchor():
    net = randomise(residual((6, 2), (8, 1)))
    data = images()
    copies = [net, *(fxfuse.permute(net, data[:2], seed=s) for s in (1, 2))]
    for anchor in range(3):
        assert gap(net, fxfuse.fuse(copies, data, anchor=anchor), data) < FUNCTION


DUPLICATED = {
    "perceptron": (lambda: mlp(6, 5, 4, 3), lambda: mlp(6, 10, 8, 3)),
    "stages": (
        lambda: stages([4, 5], [6], hidden=(7,)),
        lambda: stages([8, 10], [12], hidden=(14,)),
    ),
    "residual": (
        lambda: residual((6, 2), (8, 1)),
        lambda: residual((12, 2), (16, 1), stem=12),
    ),
}


@pytest.mark.parametrize(("name", "anchor", "order"), crossed(DUPLICATED, [0, 1], [(0, 1), (1, 0)]))
def test_a_network_with_every_unit_duplicated_fuses_back(name, anchor, order):
    narrow, wide = DUPLICATED[name]
    net = randomise(narrow())
    data = torch.randn(48, 6) if isinstance(net[0], nn.Linear) else images()
    double = widened(net, wide(), data[:2])
    assert gap(net, double, data) < FUNCTION, "the duplicate itself is wrong"
    pair = [net, double]
    fused = fxfuse.fuse([pair[i] for i in order], data, anchor=anchor)
    assert gap(net, fused, data) < FUNCTION


DEEPER = {
    "stages": (lambda: stages([5, 6], [7]), lambda: stages([4, 4, 6], [5, 7])),
    "without norms": (
        lambda: stages([5, 6], [7], norm=False),
        lambda: stages([4, 4, 6], [5, 7], norm=False),
    ),
    "one stage": (lambda: residual((6, 1), (8, 2)), lambda: residual((6, 3), (8, 2))),
    "residual": (
        lambda: residual((6, 1), (8, 2), stem=6),
        lambda: residual((4, 3), (10, 4), stem=4),
    ),
}


@pytest.mark.parametrize("name", some(DEEPER, "without norms", "one stage"))
def test_a_deepened_network_fuses_back_with_its_original(name):
    shallow, deep = DEEPER[name]
    nets, data = [randomise(shallow(), 1), randomise(deep(), 2)], images()
    deepened = fxfuse.balance(nets, data)[0]
    assert gap(nets[0], deepened, data) < FUNCTION
    for pair in ([nets[0], deepened], [deepened, nets[0]]):
        assert gap(nets[0], fxfuse.fuse(pair, data), data) < FUNCTION


def dense(layers, stem=4, growth=2):
    width = stem + growth * layers
    head = nn.BatchNorm2d(width), nn.ReLU(), Pooled(width, 3)
    return nn.Sequential(conv(3, stem), Grown(stem, growth, layers), *head)


UNEQUAL = {
    "residual": (lambda: residual((6, 3), (8, 1)), lambda: residual((6, 1), (8, 2))),
    "dense": (lambda: dense(4), lambda: dense(2)),
    "dense, the deeper second": (lambda: dense(2), lambda: dense(3)),
    "dense, of several stages": (lambda: dense(5, 4, 3), lambda: dense(3, 5, 2)),
    "tokens": (lambda: Tokens(depth=3), lambda: Tokens(depth=1)),
    "tokens of other widths": (lambda: Tokens(depth=3), lambda: Tokens(12, 3, 16, depth=1)),
}


@pytest.mark.parametrize("name", some(UNEQUAL, "dense", "tokens of other widths"))
def test_all_weight_on_one_network_gives_that_network(name):
    first, second = UNEQUAL[name]
    nets, data = [randomise(first(), 1), randomise(second(), 2)], images()
    for k in (0, 1):
        shares = [float(i == k) for i in (0, 1)]
        fused = fxfuse.fuse(nets, data, weights=shares, anchor=k)
        assert gap(nets[k], fused, data) < FUNCTION


# --- what comes out -------------------------------------------------------------------------------


def pair_of_depths():
    return [randomise(residual((6, 3), (8, 2)), 1), randomise(residual((4, 1), (6, 2), stem=4), 2)]


def test_the_result_loads_into_the_deeper_class():
    nets = pair_of_depths()
    fused = fxfuse.fuse(nets, images())
    twin = residual((6, 3), (8, 2))
    twin.load_state_dict(fused.state_dict(), strict=True)
    assert gap(fused.eval(), twin.eval(), images()) < 1e-6


def test_inputs_are_untouched_and_share_nothing_with_the_result():
    nets = pair_of_depths()
    before = [copy.deepcopy(n.state_dict()) for n in nets]
    modes = [[m.training for m in n.train().modules()] for n in nets]
    fused = fxfuse.fuse(nets, images())
    for tensor in fused.parameters():
        tensor.data.zero_()
    for net, state, mode in zip(nets, before, modes):
        assert [m.training for m in net.modules()] == mode
        for name, value in net.state_dict().items():
            assert torch.equal(value, state[name]), name


def test_the_result_trains_copies_and_exports():
    fused = fxfuse.fuse(pair_of_depths(), images())
    again = copy.deepcopy(fused)
    again.train()(images(8)).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    exported = torch.export.export(fused.eval(), (images(4),)).module()
    assert torch.allclose(exported(images(4)), fused(images(4)), atol=1e-5)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 64), nn.Linear(64, 3)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(nn.functional.dropout(x, 0.5, training=self.training))


def test_functional_dropout_stays_live_in_the_result():
    fused = fxfuse.fuse([Noisy().eval(), Noisy().eval()], torch.randn(40, 6))
    x = torch.randn(4, 6)
    assert torch.equal(fused.eval()(x), fused(x))
    fused.train()
    assert not torch.equal(fused(x), fused(x))


def test_batch_norm_of_the_result_uses_batch_statistics_in_training():
    fused = fxfuse.fuse(pair_of_depths(), images())
    before = copy.deepcopy(fused.state_dict())
    fused.train()(images(16, seed=9))
    changed = moved_names(before, fused.state_dict())
    assert {n.rpartition(".")[2] for n in changed} >= {"running_mean", "running_var"}


def moved_names(before, after):
    return {n for n in before if not torch.equal(before[n], after[n])}


def test_weights_reach_every_tensor():
    nets = [randomise(stages([5, 6], [7], hidden=(5,)), s) for s in (1, 2)]
    a, b = (fxfuse.fuse(nets, images(), weights=w) for w in ([0.5, 0.5], [0.8, 0.2]))
    floating = {n for n, t in a.state_dict().items() if t.is_floating_point()}
    assert moved(a, b) >= floating


def test_weights_are_normalised():
    nets = [randomise(mlp(6, 5, 3), s) for s in (1, 2)]
    x = torch.randn(40, 6)
    a, b = (fxfuse.fuse(nets, x, weights=w) for w in ([3, 1], [0.75, 0.25]))
    assert not moved(a, b)


def test_the_anchor_gives_the_widths():
    nets, x = pair_of_depths(), images()
    widths = [fxfuse.fuse(nets, x, anchor=k).state_dict()["0.0.weight"].shape[0] for k in (0, 1)]
    assert widths == [6, 4]


def test_each_choice_of_a_method_changes_the_result():
    from fxfuse.calibration.moments import squared_euclidean
    from fxfuse.coupling import one_map
    from fxfuse.coupling.measure import View
    from fxfuse.coupling.transport import Transport
    from fxfuse.refit import MatchMoments

    nets, x = pair_of_depths(), images()
    plain = fxfuse.fuse(nets, x)
    for choice in (
        {"coupling": Transport(ground_cost=squared_euclidean)},
        {"coupling": Transport(maps=one_map)},
        {"coupling": Transport(view=View(activated=True))},
        {"refit": MatchMoments()},
        {"refit": AsMixed()},
        {"anchor": lambda depths: 1},
    ):
        other = fxfuse.fuse(nets, x, method=fxfuse.Method(**choice))
        same_shape = outputs(plain, x).shape == outputs(other, x).shape
        assert same_shape and gap(plain, other, x) > 1e-3, choice


def test_encoders_of_words_may_differ_in_depth_and_width():
    def encoder(depth, width):
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True)
        layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        return randomise(nn.Sequential(nn.Embedding(9, width), layers, nn.Linear(width, 3)), depth)

    nets, words = [encoder(2, 8), encoder(1, 4)], torch.randint(9, (64, 5))
    others = torch.randint(9, (7, 4))
    for net, balanced in zip(nets, fxfuse.balance(nets, words)):
        assert gap(net, balanced, others) <= FUNCTION
    for k, net in enumerate(nets):
        alone = fxfuse.fuse(nets, words, weights=[1 - k, k], anchor=k)
        assert gap(net, alone, others) <= FUNCTION
    assert not fxfuse.fuse(nets[::-1], words).meta["fxfuse"].warnings


def test_the_report_names_alignment_spaces_and_times():
    fused = fxfuse.fuse(pair_of_depths(), images())
    report = fused.meta["fxfuse"]
    assert report.anchor == 0 and report.weights == (0.5, 0.5)
    assert {s.size for s in report.spaces} == {6, 8}
    sure = [c for s in report.spaces for c in s.confidences]
    assert all(0 < c <= 1 for c in sure if c is not None) and None in sure
    assert any("output" in f.reason for f in report.frozen)
    assert report.alignment.pairs[0] and sum(report.seconds.values()) > 0


def test_an_alignment_can_be_found_first_and_handed_in():
    nets, x = pair_of_depths(), images()
    alignment = fxfuse.align(nets, x)
    a, b = fxfuse.fuse(nets, x, alignment=alignment), fxfuse.fuse(nets, x)
    assert not moved(a, b)
    assert alignment.pairs[1][0] == ("1.0", "1.0")


def test_progress_names_the_stages_and_what_is_done_of_them():
    seen = []
    nets = [randomise(residual((6, 4), (8, 1))), randomise(residual((6, 3), (8, 1)))]
    fxfuse.fuse(nets, images(), progress=lambda *step: seen.append(step))
    stages_seen = list(dict.fromkeys(stage for stage, _ in seen))
    assert stages_seen[0] == "read data" and len(stages_seen) == 9
    for stage in ("align layers", "measure units", "refit"):
        shares = [share for name, share in seen if name == stage]
        assert shares[0] == 0.0 and shares[-1] == 1.0 and shares == sorted(shares)


def test_aligning_and_balancing_tell_their_stages_too():
    nets = [randomise(residual((6, 4), (8, 1))), randomise(residual((6, 3), (8, 1)))]
    for work, last in ((fxfuse.align, "align layers"), (fxfuse.balance, "balance depths")):
        seen = []
        work(nets, images(), progress=lambda *step, seen=seen: seen.append(step))
        stages_seen = list(dict.fromkeys(stage for stage, _ in seen))
        assert stages_seen[:3] == ["read data", "trace and find spaces", "align layers"]
        assert stages_seen[-1] == last
        shares = [share for stage, share in seen if stage == "trace and find spaces"]
        assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == 1.0


def test_more_data_than_one_batch_gives_the_same_as_one_tensor():
    nets, x = pair_of_depths(), images(150)
    loader = [(part, torch.zeros(len(part))) for part in x.split(37)]
    a, b = fxfuse.fuse(nets, x), fxfuse.fuse(nets, loader)
    assert gap(a, b, x) < FUNCTION


# --- what is refused ------------------------------------------------------------------------------


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def nan_weight():
    net = mlp(6, 5, 3)
    net[0].weight.data[0, 0] = float("nan")
    return net


X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))


REFUSED = {
    "no models": (ArgumentError, lambda: ([], X, {})),
    "one model outside a list": (ArgumentError, lambda: (mlp(6, 5, 3), X, {})),
    "not a model": (ModelError, lambda: ([mlp(6, 5, 3), "net"], X, {})),
    "untraceable": (TraceError, lambda: ([Branching(), Branching()], X, {})),
    "NaN weight": (ModelError, lambda: ([mlp(6, 5, 3), nan_weight()], X, {})),
    "other outputs": (ModelError, lambda: ([mlp(6, 5, 3), mlp(6, 5, 4)], X, {})),
    "other inputs": (DataError, lambda: ([mlp(6, 5, 3), mlp(7, 5, 3)], X, {})),
    "other kinds": (PairingError, lambda: ([mlp(6, 5, 3), mlp(6, 5, 3, act=nn.GELU)], X, {})),
    "no data": (DataError, lambda: ([mlp(6, 5, 3)] * 2, [], {})),
    "data of another kind": (DataError, lambda: ([mlp(6, 5, 3)] * 2, 5, {})),
    "batch refused": (DataError, lambda: ([mlp(6, 5, 3)] * 2, torch.randn(4, 9), {})),
    "later batch refused": (
        DataError,
        lambda: ([mlp(6, 5, 3)] * 2, [X[:4], X[:4, :5]], {}),
    ),
    "NaN data": (DataError, lambda: ([mlp(6, 5, 3)] * 2, X * float("nan"), {})),
    "negative weight": (ArgumentError, lambda: ([mlp(6, 5, 3)] * 2, X, {"weights": [1.5, -0.5]})),
    "too many weights": (ArgumentError, lambda: ([mlp(6, 5, 3)] * 2, X, {"weights": [1, 1, 1]})),
    "weights of zero": (ArgumentError, lambda: ([mlp(6, 5, 3)] * 2, X, {"weights": [0, 0]})),
    "NaN weights": (ArgumentError, lambda: ([mlp(6, 5, 3)] * 2, X, {"weights": [float("nan"), 1]})),
    "anchor out of range": (ArgumentError, lambda: ([mlp(6, 5, 3)] * 2, X, {"anchor": 2})),
    "anchor before the first": (ArgumentError, lambda: ([mlp(6, 5, 3)] * 2, X, {"anchor": -1})),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_error_in_four_parts_and_touches_nothing(case):
    kind, make = REFUSED[case]
    models, data, options = make()
    nets = [m for m in models if isinstance(m, nn.Module)] if isinstance(models, list) else []
    before = [copy.deepcopy(n.state_dict()) for n in nets]
    with pytest.raises(kind) as caught:
        fxfuse.fuse(models, data, **options)
    error = caught.value
    assert isinstance(error, FuseError)
    assert all([error.met, error.where, error.expected, error.do])
    for net, state in zip(nets, before):
        for name, value in net.state_dict().items():
            assert torch.equal(
                value,
                state[name],
            ) or bool(value.isnan().any())


def test_activations_that_overflow_are_named():
    nets = [randomise(mlp(6, 5, 4, 3), s) for s in (1, 2)]
    for net in nets:
        net[0].weight.data.mul_(1e30)
    with pytest.raises(DataError, match="infinite"):
        fxfuse.fuse(nets, X * 1e30)


def test_networks_of_other_stages_are_refused_with_both_lists():
    with pytest.raises(PairingError) as caught:
        fxfuse.fuse([stages([4], [5]), stages([4])], images(8))
    assert str(caught.value).count("segments of") == 2 and ">>" in str(caught.value)


def test_an_alignment_of_other_networks_is_refused():
    a, b, c = (randomise(mlp(6, *w, 3)) for w in ((5,), (5, 4), (5, 4, 4)))
    with pytest.raises(ArgumentError, match="alignment"):
        fxfuse.fuse([b, c], X, alignment=fxfuse.align([a, b], X))


class Headed(nn.Module):
    """A second head that exists in training mode only, if at all."""

    def __init__(self, headed, depth=2):
        super().__init__()
        self.body = residual((6, depth), (8, 1))
        self.extra = nn.Linear(3, 2) if headed else None

    def forward(self, x):
        y = self.body(x)
        if self.training and self.extra is not None:
            return y, self.extra(y)
        return y


def test_heads_of_training_mode_are_kept_where_all_networks_have_them():
    nets = [randomise(Headed(True), 1), randomise(Headed(True, 3), 2)]
    fused = fxfuse.fuse(nets, images())
    nets[1].load_state_dict(fused.state_dict(), strict=True)
    assert isinstance(fused.train()(images()), tuple)
    mixed = [randomise(Headed(True), 1), randomise(Headed(False, 3), 2)]
    fused = fxfuse.fuse(mixed, images())
    mixed[1].load_state_dict(fused.state_dict(), strict=True)
    assert isinstance(fused.train()(images()), torch.Tensor)


# --- choices that make no sense together ----------------------------------------------------------

DEPTHS, WIDTHS, TANHS = (
    lambda: [randomise(mlp(6, *[8] * n, 3), n) for n in (5, 3)],
    lambda: [randomise(mlp(6, 8, 8, 3), 1), randomise(mlp(6, 5, 5, 3), 2)],
    lambda: [randomise(mlp(6, *[8] * n, 3, act=nn.Tanh), n) for n in (3, 2)],
)


TASKS = lambda: [randomise(mlp(6, 8, 8, n), n) for n in (3, 4)]  # noqa: E731


DENSE = lambda: [  # noqa: E731
    randomise(nn.Sequential(conv(3, 4), Grown(4, 2, n), Pooled(4 + 2 * n, 3)), n) for n in (3, 2)
]


def by(**choices):
    return {"method": fxfuse.Method(**choices)}


def soft(**options):
    return by(coupling=Transport(solver=Sinkhorn(**options)))


def aligned_elsewhere():
    others = [randomise(mlp(6, *[8] * n, 3), n) for n in (4, 2)]
    return {"alignment": fxfuse.align(others, X)}


def paired(*pairs):
    nets = DEPTHS()
    return {"alignment": fxfuse.align(nets, X, pairs=[[*pairs], None])}


SENSELESS = {
    "assignment of unequal widths": (
        WIDTHS,
        lambda: by(coupling=Transport(solver=Assignment())),
        SolverError,
        "8 and 5 units|5 and 8 units",
    ),
    "a scaling that does not converge": (
        WIDTHS,
        lambda: soft(regularisation=1e-3, iterations=2),
        SolverError,
        "did not converge in 2 iterations: marginals",
    ),
    "a regularisation of zero": (WIDTHS, lambda: soft(regularisation=0), ArgumentError, "0"),
    "transport that leaves all behind": (
        WIDTHS,
        lambda: by(coupling=Transport(solver=UnbalancedSinkhorn(0.01, 1e-4))),
        SolverError,
        "matches no unit|did not converge",
    ),
    "weights matched across widths": (
        WIDTHS,
        lambda: by(coupling=WeightMatching()),
        PairingError,
        "one to one",
    ),
    "weights merged across widths": (
        WIDTHS,
        lambda: by(coupling=MergeMany()),
        PairingError,
        "one to one",
    ),
    "one universe for two widths": (
        WIDTHS,
        lambda: by(coupling=CycleConsistent()),
        PairingError,
        "one to one",
    ),
    "a zip that does not look within": (
        WIDTHS,
        lambda: by(coupling=Zip(view=View(activated=True))),
        ArgumentError,
        "everything=False",
    ),
    "a zip with a negative budget": (
        WIDTHS,
        lambda: by(coupling=Zip(alpha=-1.0)),
        ArgumentError,
        "alpha",
    ),
    "merging by signs what does not rectify": (
        TANHS,
        lambda: by(balancing=Shorten(gate=sign_of_sum)),
        PassError,
        "no rectifier",
    ),
    "removing what everything later reads": (
        DENSE,
        lambda: by(balancing=Shorten()),
        PassError,
        "work nothing can take over",
    ),
    "shortened to a network that is not there": (
        DEPTHS,
        lambda: by(balancing=Shorten(to=2)),
        ArgumentError,
        "network 2",
    ),
    "an alignment of other networks": (DEPTHS, aligned_elsewhere, ArgumentError, "alignment"),
    "a map by hand that is not increasing": (
        DEPTHS,
        lambda: paired(("0", "0"), ("4", "2"), ("2", "4")),
        ArgumentError,
        "out of order",
    ),
    "a map by hand of layers that are not there": (
        DEPTHS,
        lambda: paired(("0", "0"), ("7", "2"), ("8", "4")),
        ArgumentError,
        "'7' is no layer",
    ),
    "costs that are not numbers": (
        DEPTHS,
        lambda: by(layer_cost=OfActivations(lambda a, b: float("nan"))),
        ArgumentError,
        "NaN",
    ),
    "other outputs and no heads": (TASKS, dict, ModelError, "outputs of shape"),
    "heads behind no layer": (
        TASKS,
        lambda: {"heads": fxfuse.heads.Separate(after="nowhere")},
        ArgumentError,
        "'nowhere'",
    ),
    "labels that are not the outputs'": (
        TASKS,
        lambda: {"heads": fxfuse.heads.Union(labels=[[0, 1], [2]])},
        ArgumentError,
        "label",
    ),
    "transfer among three": (
        lambda: [*DEPTHS(), mlp(6, 8, 3)],
        lambda: {"method": fxfuse.presets.hmt},
        ArgumentError,
        "3 models",
    ),
}


@pytest.mark.parametrize("case", SENSELESS)
def test_choices_that_make_no_sense_are_refused_with_the_reason(case):
    make, options, kind, words = SENSELESS[case]
    nets = make()
    with pytest.raises(kind, match=words) as caught:
        chosen = options()
        method = chosen.pop("method", fxfuse.presets.best)
        method(nets, images(12) if make is DENSE else X, **chosen)
    assert all([caught.value.met, caught.value.where, caught.value.expected, caught.value.do])


class Cropped(nn.Module):
    """Cuts what it padded by sizes that it asks its input for."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        height, width = x.shape[2], x.shape[3]
        x = torch.relu(self.first(nn.functional.pad(x, (0, 4, 0, 4))))
        return self.last(x[:, :, :height, :width].mean((2, 3)))


class Pieced(nn.Module):
    """Reads a weight with a bias that is put together from two."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))
        self.one, self.other = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        bias = torch.cat([self.one, self.other])
        x = nn.functional.linear(x.mean((2, 3)), self.weight, bias)
        return self.last(torch.relu(x))


@pytest.mark.parametrize("make", [Cropped, Pieced])
@pytest.mark.parametrize("refit", [LeastSquares(), MatchMoments()])
def test_sizes_asked_for_and_biases_in_pieces(make, refit):
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    net = randomise(make(), 1)
    copy_ = fxfuse.permute(net, x[:1], seed=1)
    fused = fxfuse.fuse([net, copy_], x, method=fxfuse.Method(refit=refit))
    assert gap(net, fused, x) < FUNCTION
    assert all(bool(p.isfinite().all()) for p in fused.parameters())


# --- deeper copies --------------------------------------------------------------------------------


def test_a_deeper_copy_keeps_the_function_and_loads_into_the_deeper_class():
    shallow, deep = randomise(residual((6, 1), (8, 1))), randomise(residual((6, 3), (8, 2)), 1)
    deeper = fxfuse.net2deeper(shallow, deep, images(8))
    assert gap(shallow, deeper, images(3, seed=6)) <= 1e-4
    deep.load_state_dict(deeper.state_dict())
    assert gap(shallow, deep, images(3, seed=6)) <= 1e-4


def test_a_deeper_copy_keeps_its_own_widths():
    shallow, deep = randomise(mlp(6, 5, 5, 3)), randomise(mlp(6, 9, 9, 9, 3), 1)
    deeper = fxfuse.net2deeper(shallow, deep, torch.randn(20, 6))
    assert [p.shape[0] for p in deeper.parameters() if p.dim() == 2] == [5, 5, 5, 3]


def test_an_alignment_says_where_the_new_layers_go():
    shallow, deep, x = (
        randomise(mlp(6, 5, 5, 3)),
        randomise(mlp(6, 5, 5, 5, 3), 1),
        torch.randn(9, 6),
    )
    alignment = fxfuse.align([shallow, deep], x)
    deeper = fxfuse.net2deeper(shallow, deep, x, alignment)
    assert gap(shallow, deeper, x) <= 1e-4
    slots = [s.slots for s in alignment.segments]
    pairs = [p for rows in slots for p in zip(*rows) if None not in p]
    assert len(pairs) == 3
    for old, new in pairs:
        assert torch.equal(shallow.get_submodule(old).weight, deeper.get_submodule(new).weight)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", some(HALVES, torch.float16))
def test_half_precision_is_computed_in_single_and_given_back(dtype):
    def nets(dtype):
        found = randomise(stages([6, 6], [5]), 1), randomise(stages([4], [5, 5]), 2)
        return [net.to(dtype) for net in found]

    x = images().to(dtype).float()
    single = fxfuse.fuse([n.to(dtype).float() for n in nets(dtype)], x)
    options = {"fused": {}, "wide": {"width": 1.5}, "auto": {"weights": "auto"}}
    made = {k: fxfuse.fuse(nets(dtype), x.to(dtype), **o) for k, o in options.items()}
    made["heads"] = fxfuse.fuse(nets(dtype), x.to(dtype), heads=fxfuse.heads.Separate())
    made |= dict(zip("ab", fxfuse.balance(nets(dtype), x.to(dtype))))
    made["wider"] = fxfuse.net2wider(nets(dtype)[0], x[:2].to(dtype))
    made["narrow"] = fxfuse.narrow(nets(dtype)[0], x[:2].to(dtype))
    made["permuted"] = fxfuse.permute(nets(dtype)[0], x[:2].to(dtype), seed=1)
    for name, net in made.items():
        floats = {t.dtype for t in net.state_dict().values() if t.is_floating_point()}
        assert floats == {dtype}, name
    assert gap(single, made["fused"].float(), x) < 0.05, "rounded once, at the end"
    net = nets(dtype)[0]
    net.load_state_dict(made["permuted"].state_dict())
    fxfuse.align(nets(dtype), x.to(dtype))
    fxfuse.inspect(net, x[:2].to(dtype))
