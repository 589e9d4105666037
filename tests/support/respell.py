"""The same network written in another way, by rewrites of its graph that keep its function."""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxfuse.graph.trace import trace


def respelled(net, ways, seed=0):
    """Return a network that computes what another does, rewritten in some of `WAYS`, in order.

    Each way rewrites about two in three of the places that it finds; of one place, always.
    """
    module = trace(copy.deepcopy(net))
    generator = torch.Generator().manual_seed(seed)
    for way in ways:
        places = [n for n in module.graph.nodes if WAYS[way][0](module, n)]
        for i, node in enumerate(places):
            if i == 0 or torch.rand((), generator=generator) < 2 / 3:
                with module.graph.inserting_after(node):
                    WAYS[way][1](module, node)
    module.graph.lint()
    module.recompile()
    return module


CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def _calls(*kinds):
    def finds(module, node):
        return node.op == "call_module" and isinstance(module.get_submodule(node.target), kinds)

    return finds


def _in_place_of(node, target, *args, **kwargs):
    new = node.graph.call_function(target, args, kwargs)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _behind(module, node, part):
    name = f"extra_{sum(n.startswith('extra_') for n, _ in module.named_children())}"
    module.add_module(name, part.train(module.training))
    new = node.graph.call_module(name, (node,))
    node.replace_all_uses_with(new, lambda user: user is not new)


def _share(module, node):
    if not hasattr(module, "shared_relu"):
        module.shared_relu = nn.ReLU()
    new = node.graph.call_module("shared_relu", node.args)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _as_function(module, node):
    part = module.get_submodule(node.target)
    names = [n for n in ("weight", "bias") if getattr(part, n) is not None]
    with node.graph.inserting_before(node):
        tensors = {n: node.graph.get_attr(f"{node.target}.{n}") for n in names}
    if isinstance(part, nn.Linear):
        return _in_place_of(node, F.linear, node.args[0], *tensors.values())
    settings = {k: getattr(part, k) for k in ("stride", "padding", "dilation", "groups")}
    return _in_place_of(node, F.conv2d, node.args[0], **tensors, **settings)


def _as_product(module, node):
    part = module.get_submodule(node.target)
    path = node.target.replace(".", "_")
    setattr(module, f"{path}_matrix", nn.Parameter(part.weight.detach().t().contiguous()))
    with node.graph.inserting_before(node):
        matrix = node.graph.get_attr(f"{path}_matrix")
        new = node.graph.call_function(operator.matmul, (node.args[0], matrix))
        if part.bias is not None:
            setattr(module, f"{path}_vector", part.bias)
            new = node.graph.call_function(
                operator.add, (new, node.graph.get_attr(f"{path}_vector"))
            )
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


class Checkpointed(nn.Module):
    """A part whose activations are computed again in the backward pass."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=False)


def _checkpoint(module, node):
    part = module.get_submodule(node.target)
    if not isinstance(part, Checkpointed):
        module.set_submodule(node.target, Checkpointed(part))


def _pools(module, node):
    return node.op == "call_method" and node.target == "mean" and node.args[1:] == ((2, 3),)


def _pool(module, node):
    pooled = node.graph.call_function(F.adaptive_avg_pool2d, (node.args[0], 1))
    with node.graph.inserting_after(pooled):
        flat = node.graph.call_function(torch.flatten, (pooled, 1))
    node.replace_all_uses_with(flat)
    node.graph.erase_node(node)


def _view(module, node):
    with node.graph.inserting_after(node):
        size = node.graph.call_method("size", (node.args[0], 0))
    with node.graph.inserting_after(size):
        view = node.graph.call_method("reshape", (node.args[0], size, -1))
    node.replace_all_uses_with(view)
    node.graph.erase_node(node)


def _neutral_norm(module, node):
    part = module.get_submodule(node.target)
    norm = nn.BatchNorm2d(part.out_channels)
    norm.running_var.sub_(norm.eps)
    _behind(module, node, norm)


def _feeds_no_norm(module, node):
    norms, plain = _calls(nn.BatchNorm2d), _calls(*CONVOLUTIONS)(module, node)
    calls = [n for n in node.graph.nodes if n.target == node.target]
    return plain and len(calls) == 1 and not any(norms(module, n) for n in node.users)


def _has_norm_behind(module, node):
    norms, plain = _calls(nn.BatchNorm2d), _calls(nn.Conv2d)(module, node)
    return plain and [norms(module, n) for n in node.users] == [True]


def _fold(module, node):
    (norm,) = node.users
    conv, part = module.get_submodule(node.target), module.get_submodule(norm.target)
    turned = isinstance(conv, nn.ConvTranspose2d)
    folded = nn.utils.fuse_conv_bn_eval(conv.eval(), part.eval(), transpose=turned)
    module.set_submodule(node.target, folded)
    norm.replace_all_uses_with(node)
    node.graph.erase_node(norm)


def _without_bias(module, node):
    part = module.get_submodule(node.target) if _calls(nn.Conv2d, nn.Linear)(module, node) else None
    return part is not None and part.bias is None


def _zero_bias(module, node):
    part = module.get_submodule(node.target)
    part.bias = nn.Parameter(torch.zeros(len(part.weight)))


def _is_sum(module, node):
    return node.target is operator.add


WAYS = {  # name -> (which nodes it rewrites, the rewrite)
    "dropout": (_calls(nn.ReLU, nn.Conv2d), lambda m, n: _behind(m, n, nn.Dropout(0.3))),
    "identity": (_calls(nn.ReLU, nn.Linear), lambda m, n: _behind(m, n, nn.Identity())),
    "one relu": (_calls(nn.ReLU), _share),
    "relu as a function": (_calls(nn.ReLU), lambda m, n: _in_place_of(n, F.relu, n.args[0])),
    "checkpoints": (_calls(nn.ReLU, nn.Conv2d), _checkpoint),
    "products": (_calls(nn.Linear), _as_product),
    "layers as functions": (_calls(nn.Linear, nn.Conv2d), _as_function),
    "pooling": (_pools, _pool),
    "pooling as a function": (
        _calls(nn.MaxPool2d),
        lambda m, n: _in_place_of(n, F.max_pool2d, n.args[0], 2),
    ),
    "reshape": (_calls(nn.Flatten), _view),
    "torch.add": (_is_sum, lambda m, n: _in_place_of(n, torch.add, *n.args[::-1])),
    "a norm more": (_feeds_no_norm, _neutral_norm),
    "norms folded": (_has_norm_behind, _fold),
    "biases of zero": (_without_bias, _zero_bias),
}
