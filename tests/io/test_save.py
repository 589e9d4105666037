"""Networks as files: what comes back, in this process and in a fresh one."""

import copy
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.utils._pytree import tree_leaves
from torchvision import models

import fxfuse
from fxfuse.depth.shorten import Shorten
from fxfuse.errors import CheckpointError, FuseError, SaveError, WriteError
from fxfuse.fusion.heads import Separate, Union
from fxfuse.graph.trace import as_given, trace
from fxfuse.io.checkpoints import load_weights
from fxfuse.io.save import _digest, load, save, save_at_least_weights
from tests.support.coverage import coverage
from tests.support.files import broken
from tests.support.json_values import changed, places
from tests.support.modes import Keyed, Named
from tests.support.nets import NETS, Tokens, build, mlp, random_nets, randomise, residual
from tests.support.tolerances import FUNCTION


@dataclass
class Scores:
    logits: torch.Tensor
    states: tuple | None = None


class Scoring(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        if x.shape[1] != 6:
            raise ValueError
        h = self.a(x)
        return Scores(h, (h, h * 2))


def test_data_classes_come_back_as_dictionaries(tmp_path):
    x = torch.randn(2, 6)
    network = fxfuse.permute(Scoring(), x)
    save(network, tmp_path / "net.safetensors")
    out, expected = load(tmp_path / "net.safetensors")(x), network(x)
    assert torch.equal(out["logits"], expected.logits)
    assert torch.equal(out["states"][1], expected.states[1])


DATA = Path(__file__).parents[1] / "data"


def window_attention():
    sizes = {"patch_size": [2, 2], "window_size": [2, 2], "depths": [2], "num_heads": [2]}
    return models.SwinTransformer(embed_dim=8, num_classes=3, **sizes)


def run(net, x, seed=0):
    torch.manual_seed(seed)  # of what is dropped
    with torch.no_grad():
        return [t for t in tree_leaves(net(x)) if isinstance(t, torch.Tensor)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def require_same(net, again, x):
    """Every fact about two networks that a user can see is the same."""
    assert same(run(net, x), run(again, x))
    for one, other in zip(net.state_dict().items(), again.state_dict().items(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
        assert one[1].dtype == other[1].dtype and one[1].stride() == other[1].stride()
    for (name, a), (other, b) in zip(net.named_modules(), again.named_modules(), strict=True):
        assert name == other and a.training == b.training and a.extra_repr() == b.extra_repr()
        assert isinstance(a, fx.GraphModule) or type(a) is type(b)
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad
    assert [n.name for n in net.graph.nodes] == [n.name for n in again.graph.nodes]
    assert [n.meta.get("origin") for n in net.graph.nodes] == [
        n.meta.get("origin") for n in again.graph.nodes
    ]


def reload(net, folder):
    save(net, folder / "net.safetensors")
    return load(folder / "net.safetensors")


def images(count=8):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(7))


FUSED = {
    "layers": lambda: fxfuse.fuse([mlp(6, 8, 7, 3), mlp(6, 5, 3)], torch.randn(40, 6)),
    "blocks": lambda: fxfuse.fuse(
        [randomise(residual((6, 2), (8, 1))), randomise(residual((6, 1), (7, 1)))], images(24)
    ),
    "attention": lambda: fxfuse.fuse([randomise(Tokens(depth=2)), randomise(Tokens())], images(24)),
    "windows": lambda: fxfuse.fuse([randomise(window_attention()) for _ in "ab"], images(24)),
    "heads": lambda: fxfuse.fuse(
        [randomise(residual((6, 1))), randomise(residual((6, 1), classes=5), 1)],
        images(24),
        heads=Separate(),
    ),
    "labels": lambda: fxfuse.fuse(
        [randomise(residual((6, 1))), randomise(residual((6, 1)), 1)],
        images(24),
        heads=Union(labels=[list("abc"), list("bcd")]),
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_network_comes_back_with_its_report(tmp_path, name):
    net = FUSED[name]()
    again = reload(net, tmp_path)
    require_same(net, again, torch.randn(4, 6) if name == "layers" else images())
    assert again.meta["fxfuse"] == net.meta["fxfuse"]
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_pictures_of_a_report_that_was_saved_say_what_they_said(tmp_path):
    """Facts of layers and removed layers are kept; maps of couplings, which are large, are not."""
    method = fxfuse.Method(balancing=Shorten())
    nets = [randomise(mlp(4, 8, 7, 5, 3)), randomise(mlp(4, 6, 5, 3), 1)]
    net = fxfuse.fuse(nets, torch.randn(40, 4), method=method)
    old, new = (n.meta["fxfuse"] for n in (net, reload(net, tmp_path)))
    assert any(old.removed) and new.removed == old.removed
    assert old.memory and old.seconds and not new.memory and not new.seconds
    assert old.alignment.facts and new.alignment.facts == old.alignment.facts
    assert old.maps and not new.maps
    for i, report in enumerate((replace(old, seconds={}), new)):
        report.save_html(tmp_path / f"{i}.html")
    assert (tmp_path / "0.html").read_text() == (tmp_path / "1.html").read_text()


@pytest.mark.parametrize("name", NETS)
def test_every_structure_comes_back(tmp_path, name):
    net, x = build(name)
    graph = trace(net)
    require_same(graph, reload(graph, tmp_path), x)


@given(random_nets())
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_networks_come_back_and_their_weights_load_into_the_original_class(tmp_path, net):
    x = images(2)
    shuffled = fxfuse.permute(net, x)
    again = reload(shuffled, tmp_path)
    require_same(shuffled, again, x)
    load_weights(net, tmp_path / "net.safetensors")
    assert torch.allclose(run(net, x)[0], run(again, x)[0], rtol=FUNCTION, atol=FUNCTION)


@pytest.mark.parametrize("kind", [Named, Keyed])
def test_heads_of_training_mode_come_back(tmp_path, kind):
    net, x = trace(randomise(kind())), torch.randn(4, 6)
    again = reload(net, tmp_path)
    for mode in (False, True):
        assert same(run(net.train(mode), x), run(again.train(mode), x))
        assert type(net(x)).__name__ == type(again(x)).__name__


class Odd(nn.Module):
    """Everything about tensors that a state dictionary does not hold."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.a.bias.requires_grad = False
        self.conv = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.drop = nn.Dropout(0.5).eval()
        self.register_buffer("hidden", torch.tensor([1.0, 2.0]), persistent=False)
        self.register_buffer("none", torch.ones(0, 2), persistent=False)
        self.register_buffer("wave", torch.randn(4, dtype=torch.complex64))
        self.register_buffer("deep", torch.randn(4, dtype=torch.complex128), persistent=False)
        self.register_buffer("seen", torch.tensor(3))
        self.constant = torch.randn(4).bfloat16()
        self.soft = nn.Parameter(torch.ones(4, dtype=torch.float16))

    def forward(self, x):
        y = self.drop(self.conv(x)).mean((2, 3)) * self.soft.float() + self.constant
        y = torch.view_as_real(y * self.wave * self.deep).sum(-1).float()
        return self.b(self.a(y)) + self.hidden[0] * self.seen + self.none.sum()


def test_ties_modes_types_layouts_and_tensors_outside_the_state_come_back(tmp_path):
    odd = Odd().train()
    odd.drop.eval()
    net = as_given(odd, trace(odd))
    net.register_buffer("twin", net.a.bias)
    again, x = reload(net, tmp_path), images(2)
    require_same(net, again, x)
    assert again.a.weight is again.b.weight and not again.a.bias.requires_grad
    assert again.twin is again.a.bias and again.training and not again.drop.training
    assert again.conv.weight.is_contiguous(memory_format=torch.channels_last)
    hidden = {n for n, _ in again.named_buffers()} - set(again.state_dict())
    assert hidden == {"hidden", "none", "deep", "constant"}
    assert again.deep.dtype == torch.complex128 and again.soft.dtype == torch.float16
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, again.get_buffer(name))


class Versioned(nn.Linear):
    """A class that refuses a state of another version."""

    _version = 3

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 3:
            raise ValueError("of which version?")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_the_version_of_a_state_comes_back(tmp_path):
    net = Versioned(4, 3)
    net.load_state_dict(reload(trace(net), tmp_path).state_dict())
    other = Versioned(4, 3)
    load_weights(other, tmp_path / "net.safetensors")
    assert torch.equal(other.weight, net.weight)


class Recurrent(nn.Module):
    """Layers with state beside their parameters: lists of them, and functions."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(12, 2, 8, activation="gelu", batch_first=True)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        return self.out(self.layer(self.lstm(x)[0]))


def test_layers_with_other_state_come_back_and_learn(tmp_path):
    net = trace(Recurrent().eval())
    again, x = reload(net, tmp_path), torch.randn(2, 5, 4)
    require_same(net, again, x)
    again.train()(x).sum().backward()
    assert all(p.grad is not None for p in again.parameters())


# --- what can be done with it ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return reload(FUSED["blocks"](), tmp_path_factory.mktemp("loaded"))


def test_it_still_trains(loaded):
    net, x, y = copy.deepcopy(loaded).train(), images(16), torch.arange(16) % 3
    optimiser, losses = torch.optim.Adam(net.parameters(), 0.01), []
    for _ in range(15):
        loss = nn.functional.cross_entropy(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None and p.grad.any() for p in net.parameters() if p.numel())
    assert losses[-1] < 0.7 * losses[0]


def test_it_is_copied_moved_and_loaded_into_the_original_class(loaded):
    x = images()
    assert same(run(copy.deepcopy(loaded), x), run(loaded, x))
    double = copy.deepcopy(loaded).to(torch.float64)
    assert torch.allclose(run(double, x.double())[0].float(), run(loaded, x)[0], atol=1e-4)
    assert copy.deepcopy(loaded).to("meta")(x.to("meta")).shape == (8, 3)
    original = residual((6, 2), (8, 1)).eval()
    original.load_state_dict(loaded.state_dict(), strict=True)
    assert torch.allclose(run(original, x)[0], run(loaded, x)[0], rtol=FUNCTION, atol=FUNCTION)


def test_it_is_exported_and_compiled(loaded):
    x = images()
    exported = torch.export.export(loaded, (x,)).module()
    assert torch.allclose(run(exported, x)[0], run(loaded, x)[0], rtol=FUNCTION, atol=FUNCTION)
    compiled = torch.compile(loaded, backend="eager")
    assert torch.allclose(run(compiled, x)[0], run(loaded, x)[0], rtol=FUNCTION, atol=FUNCTION)


def test_it_is_saved_traced_and_fused_again(loaded, tmp_path):
    x = images(24)
    require_same(loaded, reload(loaded, tmp_path), x)
    fused = fxfuse.fuse([loaded, fxfuse.permute(loaded, x)], x)
    assert torch.allclose(run(fused, x)[0], run(loaded, x)[0], rtol=1e-3, atol=1e-3)


# --- in a fresh process ---------------------------------------------------------------------------

PROGRAM = """
import hashlib, sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
import fxfuse

def digest(tensors):
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()

x = torch.load({folder!r} + "/x", weights_only=True)
nets = {{name: fxfuse.load({folder!r} + "/" + name) for name in {names!r}}}
assert not any("nets" in name for name in sys.modules)
for name, net in nets.items():
    with torch.no_grad():
        out = net(x)
    print(name, digest(out if isinstance(out, (tuple, list)) else [out]))
print("fused", digest(fxfuse.fuse([nets["deep"], nets["shallow"]], x).state_dict().values()))
"""


def digest(tensors):
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


@pytest.mark.sweep
def test_a_fresh_process_loads_and_fuses_to_the_same_bits(tmp_path):
    x = images(24)
    nets = {name: FUSED[name]() for name in ("attention", "windows", "heads")}
    nets["deep"] = trace(randomise(residual((6, 2), (8, 1))))
    nets["shallow"] = trace(randomise(residual((6, 1), (7, 1)), 1))
    torch.save(x, tmp_path / "x")
    for name, net in nets.items():
        save(net, tmp_path / name)
    wanted = {name: digest(run(net, x)) for name, net in nets.items()}
    fused = [fxfuse.fuse([nets["deep"], nets["shallow"]], x).state_dict() for _ in range(2)]
    wanted["fused"] = digest(fused[0].values())
    assert digest(fused[1].values()) == wanted["fused"]
    root = str(Path(fxfuse.__file__).parents[1])
    program = PROGRAM.format(root=root, names=list(nets), folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert dict(line.split() for line in done.stdout.splitlines()) == wanted


# --- files that are refused -----------------------------------------------------------------------


def header_of(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["fxfuse"])


def write(path, header, state, digest=None):
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(state, path, {"fxfuse": text, "sha256": digest or _digest(text, state)})


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "net.safetensors"
    net = FUSED["layers"]()
    save(net, path)
    return net, path, header_of(path), load_file(path)


def test_weights_alone_and_other_files_are_refused(tmp_path, small):
    net, path, *_ = small
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="weights without a network"):
        load(tmp_path / "weights.safetensors")
    torch.save(net.state_dict(), tmp_path / "w.pt")
    for other in (tmp_path / "w.pt", tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load(other)


@pytest.mark.parametrize("key", ["format", "version"])
def test_other_formats_and_later_versions_are_refused(small, key):
    _, path, header, state = small
    write(path, header | {key: 2}, state)
    with pytest.raises(CheckpointError, match="version") as caught:
        load(path)
    assert caught.value.where == str(path) and "version 1" in caught.value.expected


def test_changed_numbers_and_changed_descriptions_are_refused(small):
    _, path, header, state = small
    good = _digest(json.dumps(header), state)
    write(path, header, state, good)
    assert load(path)
    other = state | {"0.bias": state["0.bias"] + 1}
    for content in ((header, other), (header | {"report": None}, state)):
        write(path, *content, good)
        with pytest.raises(CheckpointError, match="changed since"):
            load(path)


def test_a_report_of_another_shape_is_refused(small):
    _, path, header, state = small
    for where in [p for p in places(header["report"]) if 0 < len(p) < 3][:20]:
        write(path, header | {"report": changed(header["report"], where, {"x": []})}, state)
        with pytest.raises(CheckpointError):
            load(path)
    for text in ("", "[]", "{}", "null", '{"format": "fxfuse network", "version": 1}'):
        write(path, text, state)
        with pytest.raises(CheckpointError):
            load(path)


@given(
    st.floats(0, 1),
    st.sampled_from(["cut", "flip", "drop", "insert"]),
    st.binary(min_size=1, max_size=4),
)
@settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_broken_files_are_refused(small, share, how, new):
    net, path, _, state = small
    whole = path.read_bytes()
    other = path.with_name("broken.safetensors")
    other.write_bytes(broken(whole, share, how, new))
    try:
        again = load(other)
    except FuseError as error:
        assert str(other) in error.where
    else:
        require_same(net, again, torch.randn(2, 6))


# --- what is not written --------------------------------------------------------------------------


def test_only_graphs_are_saved(tmp_path):
    with pytest.raises(SaveError, match="a Sequential"):
        save(mlp(4, 3, 2), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_weights_alone_are_written_where_the_network_is_refused(small):
    net, path, _, state = small
    assert save_at_least_weights(net, path) is None and load(path)
    net.get_submodule("0").extra = object()
    assert "object" in save_at_least_weights(net, path).met
    assert same(list(load_file(path).values()), list(state.values()))
    with pytest.raises(CheckpointError, match="without a network"):
        load(path)


def test_a_full_disk_leaves_the_old_network(small, monkeypatch):
    net, path, *_ = small
    before = path.read_bytes()

    def fail(_, temporary, *rest):
        Path(temporary).write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxfuse.io.checkpoints.save_file", fail)
    with pytest.raises(WriteError, match="No space left"):
        save(net, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_refused_part_leaves_the_old_file(tmp_path, small):
    net, path, *_ = small
    before = path.read_bytes()
    net.get_submodule("0").extra = object()
    with pytest.raises(SaveError, match="object"):
        save(net, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --- every network of torchvision -----------------------------------------------------------------


@pytest.mark.sweep
@pytest.mark.parametrize("name", coverage.names_in("torchvision"))
def test_networks_of_torchvision_come_back(tmp_path, name):
    if name in coverage.GIANTS:
        pytest.skip("more memory than a test may take")
    net = coverage.build(name)
    x = coverage.example(name, net, 2)
    shuffled = fxfuse.permute(net, x[:1], seed=1)
    require_same(shuffled, reload(shuffled, tmp_path), x)
    load_weights(net, tmp_path / "net.safetensors")


def test_files_of_earlier_versions_still_load():
    """They name classes by the modules of that time."""
    expected = load_file(DATA / "expected_of_0_1_0.safetensors")
    network = load(DATA / "saved_by_0_1_0.safetensors")
    with torch.no_grad():
        assert torch.equal(network.eval()(expected["x"]), expected["y"])
    assert not torch.equal(network.train()(expected["x"]), expected["y"]), "dropout is live"
    report = network.meta["fxfuse"]
    assert report.alignment == fxfuse.Alignment.load(DATA / "alignment_by_0_1_0.json")
