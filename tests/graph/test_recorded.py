"""Recorded forwards: what symbolic tracing refuses or gets wrong is the model's function, too."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import TraceError
from fxfuse.graph.inputs import Inputs
from fxfuse.graph.recorded import record
from fxfuse.graph.trace import trace, trace_alike
from tests.support.nets import gap, outputs, randomise
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION, PERMUTATION

RECORDED = ["recorded"]


class Shaped(nn.Module):
    """Branches on shapes, and lays out sizes."""

    def __init__(self, width=8):
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x):
        batch, length, features = x.shape
        assert features == 6
        if x.dim() != 3:
            x = x.unsqueeze(1)
        flat = torch.relu(self.a(x.reshape(batch * length, -1)))
        h = flat.view(batch, length, -1) + torch.arange(length)[None, :, None] / length
        for row in h.unbind(1)[:1]:
            h = h + row[:, None]
        return self.b(1 - h)


class BehindTuple(nn.Module):
    """Looks at the type of what a part returns, which is no tuple while it is traced."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        h = self.rnn(x)
        h = h[0] if isinstance(h, tuple) else h
        return self.head(h)


class SilentlyOther(nn.Module):
    """Is traced symbolically into another function."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(6, 8, batch_first=True)
        self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        h = self.rnn(x)
        return self.a(h[0]) if isinstance(h, tuple) else self.b(h[0])


class OfTorch(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(layer, depth)

    def forward(self, x, mask=None, features=False):
        h = self.encoder(self.a(x), mask=mask)
        return h if features else self.b(h)


class Pair(nn.Module):
    """An encoder and a decoder of torch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.both = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)

    def forward(self, source, target):
        return self.b(self.both(self.a(source), self.a(target)))


NETS = [Shaped, BehindTuple, SilentlyOther, OfTorch]


def sequences(count=2, length=5):
    return torch.randn(count, length, 6)


@pytest.mark.parametrize("net", NETS)
def test_the_graph_computes_what_the_model_computes_on_other_sizes_too(net):
    net = randomise(net())
    graph = trace(net, sequences())
    assert graph.meta["door"] == "recorded"
    for x in (sequences(), sequences(5, 5), sequences(3, 7)):
        assert gap(net, graph, x) <= FUNCTION
    assert set(graph.state_dict()) <= set(net.state_dict())


@pytest.mark.parametrize("net", some(NETS, Shaped, BehindTuple, SilentlyOther))
def test_units_may_be_permuted_and_networks_fused(net):
    net, x = randomise(net()), sequences(12)
    permuted = fxfuse.permute(net, x, seed=1)
    assert gap(net, permuted, x) <= FUNCTION
    fused = fxfuse.fuse([net, permuted], x)
    assert gap(net, fused, x) <= 10 * FUNCTION
    net.load_state_dict(fused.state_dict())


def test_an_encoder_with_a_decoder_is_looked_into():
    net, x = randomise(Pair()), (sequences(), sequences(2, 4))
    graph = trace(net, x)
    calls = {n.target for n in graph.graph.nodes if n.op == "call_module"}
    assert "both.decoder.layers.0.multihead_attn" in calls and "both" not in calls
    with torch.no_grad():
        assert torch.allclose(graph(*x), net(*x), atol=1e-5)


def test_encoders_of_torch_of_different_depth_are_fused():
    deep, shallow = randomise(OfTorch(3), seed=1), randomise(OfTorch(2), seed=2)
    fused = fxfuse.fuse([deep, shallow], sequences(16))
    deep.load_state_dict(fused.state_dict())
    assert gap(deep, fused, sequences()) <= FUNCTION


def test_both_ways_to_write_a_graph_agree_where_both_can():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs = Inputs.of(net, torch.randn(2, 6))
    graph = record(net.eval(), inputs, frozenset())
    symbolic = trace(net, torch.randn(2, 6))
    assert [n.target for n in graph.nodes] == [n.target for n in symbolic.graph.nodes]


def test_sizes_are_read_nearby_and_not_from_the_input():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                b, n, _ = x.shape
                if b:
                    x = layer(x).view(b, n, 2, 3).transpose(1, 2).reshape(b, n, -1)
            return x

    graph = trace(Blocks(), sequences(), doors=RECORDED)
    x = next(n for n in graph.graph.nodes if n.op == "placeholder")
    assert {n.target for n in x.users} <= {"layers.0", "size"}
    assert {n.name for n in x.users if n.target == "size"} == set()


def test_dropout_and_its_rate_follow_the_mode():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

        def forward(self, x):
            if x.dim() != 3:
                x = x[None]
            q = self.drop(self.a(x))
            rate = 0.5 if self.training else 0.0
            x = F.scaled_dot_product_attention(q, q, q, dropout_p=rate)
            return F.dropout(x, 0.5, self.training)

    net, x = randomise(Attends()), sequences()
    graph = trace(net, x)
    assert len(list(graph.graph.nodes)) > 4, "the model is no single node"
    assert gap(net.eval(), graph.eval(), x) <= FUNCTION
    for module in (net.train(), graph.train()):
        torch.manual_seed(1)
        module.drawn = outputs(module, x)
    assert torch.equal(net.drawn, graph.drawn)


def test_tensors_of_the_forward_and_of_attributes_are_constants():
    class Constants(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.scale = nn.Linear(6, 6), torch.tensor([2.0])
            self.register_buffer("table", torch.randn(9, 6), persistent=False)

        def forward(self, x):
            if x.shape[1] > 9:
                raise ValueError("too long")
            return self.a(x) * self.scale + self.table[: x.shape[1]] + torch.tensor(0.5)

    net, x = Constants(), sequences()
    graph = trace(net, x)
    assert graph.meta["door"] == "recorded" and gap(net, graph, sequences(2, 3)) == 0
    assert set(graph.state_dict()) == {"a.weight", "a.bias"}


@dataclass
class Answer:
    logits: Tensor
    states: tuple[Tensor, ...] | None = None
    cache: object = None


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        if len(x.shape) != 2:
            raise ValueError
        h = self.a(x)
        return {"answer": Answer(h, (h, h * 2), cache=object()), "rest": [h[0], None]}


def test_structures_are_returned_and_objects_left_out():
    net, x = Structured(), torch.randn(2, 6)
    out, expected = trace(net, x)(x), net(x)
    assert torch.equal(out["answer"].states[1], expected["answer"].states[1])
    assert out["answer"].cache is None and out["rest"][1] is None


def test_a_recorded_graph_is_its_own_recording():
    graph = trace(OfTorch(), sequences(), doors=RECORDED)
    again = trace(graph, sequences(), doors=RECORDED)
    assert [n.format_node() for n in again.graph.nodes] == [
        n.format_node() for n in graph.graph.nodes
    ]


def test_networks_are_written_by_the_same_front_end():
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    graphs = trace_alike([plain, Shaped()], sequences(), ["a", "b"])
    assert {g.meta["door"] for g in graphs} == {"recorded"}
    assert trace(plain, sequences()).meta["door"] == "traced symbolically"


def test_the_same_tensor_may_be_given_twice():
    class Two(nn.Module):
        def forward(self, x, y):
            return x - 2 * y if len(x.shape) == 2 else x

    x, y = torch.randn(2, 3), torch.randn(2, 3)
    graph = trace(Two(), (x, x))
    assert torch.equal(graph(x, y), x - 2 * y)


class OnValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        h = self.a(x)
        if h.sum() > 0:
            h = h * 2
        return h


def test_a_branch_on_values_is_refused_by_file_and_line():
    with pytest.raises(TraceError) as caught:
        fxfuse.find_spaces(OnValues(), torch.randn(2, 6))
    error = caught.value
    line = OnValues.forward.__code__.co_firstlineno + 2
    assert f"{__file__}:{line}, `if h.sum() > 0:`" in error.where
    assert "traced symbolically:" in error.met and "recorded:" in error.met


class OnArrays(OnValues):
    """Leaves torch for numpy."""

    def forward(self, x):
        return torch.from_numpy(np.tanh(self.a(x).detach().numpy()))


class OneLoops(OnValues):
    """Runs as often as its values ask for."""

    def forward(self, x):
        h = self.a(x)
        while h.abs().max() > 0.5:
            h = h / 2
        return h


class AroundAPart(nn.Module):
    def __init__(self, kind, width=8):
        super().__init__()
        self.a, self.b, self.part = nn.Linear(4, width), nn.Linear(width, 6), kind()
        self.c, self.d = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, x):
        h = self.part(self.b(torch.relu(self.a(x))))
        return self.d(torch.relu(self.c(h)))


@pytest.mark.parametrize("kind", [OnValues, OnArrays, OneLoops])
def test_a_part_that_no_front_end_can_look_into_stays_and_the_rest_works(kind):
    net, x, other = randomise(AroundAPart(kind)), torch.randn(40, 4), 3 * torch.randn(50, 4)
    inspection = fxfuse.inspect(net, x)
    assert inspection.spaces.free_units == 16
    fixed = {f.tensor for f in inspection.reasons["its values leave torch, as numbers or an array"]}
    assert {"b.weight", "part.a.weight"} <= fixed
    moved = fxfuse.permute(net, x, seed=1)
    assert not torch.equal(moved.state_dict()["a.weight"], net.a.weight)
    fused = fxfuse.fuse([net, moved], x)
    for given in (x, other, -other):
        assert gap(net, moved, given) < PERMUTATION
        assert gap(net, fused, given) < 10 * FUNCTION


class OfBatch(nn.Module):
    """Looks at how many samples there are."""

    def __init__(self, step):
        super().__init__()
        self.a, self.b, self.step = nn.Linear(6, 8), nn.Linear(8, 3), step

    def forward(self, x):
        return self.b(self.step(torch.relu(self.a(x))))


class Rows(nn.Module):
    def forward(self, h):
        return torch.stack([row / (1 + row.sum()) for row in h])


OF_BATCH = {
    "their number": lambda h: h * (1 + len(h)),
    "their share": lambda h: h / len(h) + h.shape[0] * torch.ones(len(h), 1),
    "places among them": lambda h: h + torch.arange(len(h))[:, None] / len(h),
    "a loop in a part": Rows(),
}


@pytest.mark.parametrize("case", some(OF_BATCH, "their share", "a loop in a part"))
def test_the_number_of_samples_is_read_from_each_batch(case):
    net, x = randomise(OfBatch(OF_BATCH[case])), torch.randn(4, 6)
    moved = fxfuse.permute(net, x, seed=1)
    assert not torch.equal(moved.state_dict()["a.weight"], net.a.weight)
    for samples in (1, 4, 7):
        assert gap(net, moved, torch.randn(samples, 6)) < PERMUTATION


WRONG_BATCH = {
    "another size": lambda h: torch.stack([h[i] * (1 + i) for i in range(len(h))]),
    "one sample": lambda h: h if len(h) > 1 else 2 * h,
}


@pytest.mark.parametrize("kind", WRONG_BATCH)
def test_what_is_another_function_of_each_batch_is_refused(kind):
    with pytest.raises(TraceError, match=f"on a batch of {kind}") as caught:
        trace(OfBatch(WRONG_BATCH[kind]), torch.randn(2, 6))
    assert "len(h)" in caught.value.where and "loop over the samples" in caught.value.do


class Padded(nn.Module):
    """Calls operators whose sizes only Python works out; its numbers are numpy's."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.a(x) / np.sqrt(np.float64(6))
        length = h.shape[1]
        h = F.pad(h, (0, 0, 0, -length % 4))
        if length % 4:
            h = torch.zeros(1, 1, 1).expand(len(h.shape) - 2, 1, 1) + h
        scores = torch.zeros(1, 1, h.shape[1]).baddbmm(h, h.transpose(1, 2))
        return self.b(torch.bmm(scores.softmax(-1), h))[:, :length]


class Flattens(nn.Module):
    """Attention whose heads and samples share an axis, as in older language models."""

    def __init__(self, depth):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(depth))
        self.qkvs = nn.ModuleList(nn.Linear(8, 24) for _ in range(depth))
        self.outs = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.ups = nn.ModuleList(nn.Linear(8, 12) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(12, 8) for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        samples, length, _ = x.shape
        if length > 100:  # no symbolic tracing
            raise ValueError("too long")
        layers = zip(self.norms, self.qkvs, self.outs, self.ups, self.downs)
        for norm, qkv, out, up, down in layers:
            parts = qkv(norm(x)).view(samples, length, 2, 12).transpose(1, 2).chunk(3, -1)
            q, k, v = (t.reshape(samples * 2, length, 4) for t in parts)
            mixed = torch.bmm((torch.bmm(q, k.transpose(1, 2)) / 2).softmax(-1), v)
            mixed = mixed.view(samples, 2, length, 4).transpose(1, 2).reshape(samples, length, 8)
            x = x + out(mixed)
            x = x + down(up(x).relu())
        return self.head(x)


def test_sizes_are_computed_from_tensors_at_hand_not_read_in_another_layer():
    x = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0))
    nets = [randomise(Flattens(2), 1), randomise(Flattens(3), 11)]
    near = fxfuse.fuse(nets, x).meta["fxfuse"].nearness
    assert near.fused < max(near.networks)


def test_operators_that_python_decomposes_are_recorded():
    net = randomise(Padded())
    graph = trace(net, sequences())
    for x in (sequences(), sequences(3, 5)):
        assert gap(net, graph, x) <= FUNCTION
    assert gap(net, fxfuse.permute(net, sequences()), sequences()) <= FUNCTION


def test_what_cannot_run_without_data_is_run_on_numbers_and_nothing_is_printed(capfd):
    net = nn.Sequential(Shaped(), nn.Linear(3, 6), nn.LSTM(6, 4, batch_first=True))
    graph = trace(net, sequences())
    assert graph.meta["door"] == "recorded" and graph(sequences(3, 7))[0].shape == (3, 7, 4)
    fxfuse.find_spaces(Padded(), sequences())
    assert capfd.readouterr() == ("", "")


class Groups(nn.Module):
    """Sums up samples in as many groups as their numbers say."""

    def __init__(self, count):
        super().__init__()
        self.a, self.b, self.count = nn.Linear(6, 8), nn.Linear(8, 3), count

    def forward(self, x, group):
        h = torch.relu(self.a(x))
        sums = h.new_zeros(self.count(group), h.shape[1]).index_add(0, group, h)
        return self.b(sums)


COUNTS = {
    "int": lambda g: int(g.max()) + 1,
    "item": lambda g: g.max().item() + 1,
    "twice": lambda g: 2 * int(g.max()) + 3,
}


@pytest.mark.parametrize("name", some(COUNTS, "int"))
def test_a_number_that_is_read_from_a_tensor_is_read_by_the_graph(name):
    net, x = randomise(Groups(COUNTS[name])), torch.randn(9, 6)
    group = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3])
    graph = trace(net, (x, group), doors=RECORDED)
    for other in (group, group % 2, group + torch.arange(9)):
        assert gap(net, graph, x, other) == 0.0
    assert gap(net, fxfuse.permute(net, (x, group), seed=1), x, group % 2) < PERMUTATION


def _branch(group):
    return int(group.max()) + 1 if int(group.max()) > 5 else 4


def _loop(group):
    return max(range(int(group.max()) + 1)) + 1 if len(range(int(group.max()))) % 2 else 4


BRANCHES = {"branch": _branch, "loop": _loop}


@pytest.mark.parametrize("name", some(BRANCHES, "branch"))
def test_what_branches_on_such_a_number_is_refused_or_a_part_by_itself(name):
    count = BRANCHES[name]
    x, group = torch.randn(9, 6), torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3])
    with pytest.raises(TraceError):
        trace(randomise(Groups(count)), (x, group))

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.part = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 6)), Groups(count)

        def forward(self, x, group):
            return self.part(self.stem(x), group)

    net = randomise(Inside())
    graph = trace(net, (x, group))
    assert any(n.op == "call_module" and n.target == "part" for n in graph.graph.nodes)
    assert gap(net, graph, x, group) == 0.0


def test_a_size_that_mixes_a_number_read_with_one_of_the_inputs_is_refused():
    def count(group):
        return (int(group.max()) + 1) * group.shape[0]

    x, group = torch.randn(3, 6), torch.tensor([0, 1, 1])
    with pytest.raises(TraceError, match="read from a tensor"):
        trace(Groups(count), (x, group), doors=RECORDED)


class Leaves(nn.Module):
    """Two of each leaf, of one form and of another, some of which return what they were given."""

    def __init__(self):
        super().__init__()
        wide = nn.Linear(8, 5)
        self.parts = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8, bias=False)])
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.keep = nn.ModuleList([nn.Dropout(0.5), nn.Dropout(0.5), nn.ReLU(inplace=True)])
        self.last, self.odd = wide, nn.Linear(8, 8)
        self.odd.forward = lambda x: wide(x).repeat(1, 2)

    def forward(self, x):
        if x.shape[1] == 7:
            return x
        a, b, c = (part(x) for part in self.parts)
        a, b = (norm(h) for norm, h in zip(self.norms, (a, b)))
        kept = self.keep[0](a)
        kept = self.keep[2](self.keep[1](kept))
        return self.last(kept + b + c + a), self.odd(kept).sum(1)


def test_leaves_of_one_form_are_run_once_and_each_is_a_step_of_its_own():
    net, x = randomise(Leaves()), torch.randn(4, 6)
    graph = trace(net, x, doors=["recorded"])
    called = [str(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    assert {"parts.0", "parts.1", "norms.0", "norms.1"} <= {*called}
    for count in (4, 3):
        for mine, theirs in zip(net.eval()(x[:count]), graph.eval()(x[:count])):
            assert torch.allclose(mine, theirs, atol=FUNCTION)


class InAList(nn.Module):
    """A layer that no module holds is no state: its weights are constants of the forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.beside = [nn.Linear(8, 8)]

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h + self.beside[0](h))


def test_layers_in_a_list_are_constants_and_no_state():
    net, x = randomise(InAList(), 0), torch.randn(9, 6)
    again = InAList().eval()
    again.load_state_dict(fxfuse.permute(net, x, seed=1).state_dict())
    assert gap(net, again, torch.randn(5, 6)) < FUNCTION


class Assigned(nn.Module):
    """Two halves are written into a value that the forward makes."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 3)
        self.way = way

    def forward(self, x):
        h = torch.zeros(x.shape[0], 16, dtype=x.dtype)
        if self.way == "items":
            h[:, :8], h[:, 8:] = self.a(x), self.b(x)
        elif self.way == "sums":
            h[:, :8] += self.a(x)
            h[:, 8:] += self.b(x)
        else:
            left, right = h[:, :8], h[:, 8:]
            left.copy_(self.a(x))
            right.copy_(self.b(x))
        return self.head(h.tanh())


@pytest.mark.parametrize(("way", "free"), [("items", 16), ("sums", 8), ("views", 16)])
def test_what_is_written_into_a_part_is_read_from_the_whole(way, free):
    net, x, data = randomise(Assigned(way), 0), torch.randn(4, 6), torch.randn(40, 6)
    assert sum(space.size for space in fxfuse.find_spaces(net, x)) >= free
    permuted = fxfuse.permute(net, x, seed=1)
    fused = pickle.loads(pickle.dumps(fxfuse.fuse([net, permuted], data)))
    assert gap(net, permuted, torch.randn(5, 6)) < FUNCTION > gap(net, fused, torch.randn(5, 6))
