"""What fxfuse understands of other people's networks: free units, exactness, time.

Every number of a network is drawn anew first (biases, affine parameters, statistics, heads), since
fresh zeros and ones hide wrong permutations. Then all its units are permuted at random, and on
request the network is fused with that permuted copy; both must leave its outputs as they are. Two
networks of a family (`resnet18+resnet34`) are balanced, which must keep both functions, and fused.

    python examples/coverage.py [NAME ...] [--collection torchvision|timm|pairs|transformers]
                                [--fuse] [--giants] [--write table.md]

A name is one of torchvision (`mobilenet_v2?width_mult=0.5`), of timm (`timm/resnet10t`), or an
architecture of transformers (`transformers/bert`, `transformers/bert?deeper=1&wider=2`), of which a
tiny network is made.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.util
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchvision import models

import fxfuse
from fxfuse.graph.structures import tensors_in

OTHERS = ("class", "deeper", "deeper class", "wider class")
Example = Tensor | dict[str, Tensor]
GIANTS = {"regnet_y_128gf", "vit_h_14"}
OPTIONS = {
    **dict.fromkeys(["googlenet", "inception_v3"], {"init_weights": True}),
    **dict.fromkeys(models.list_models(module=models.segmentation), {"weights_backbone": None}),
}
for _name in OPTIONS:
    if _name.startswith(("fcn", "deeplab")):
        OPTIONS[_name] = {**OPTIONS[_name], "aux_loss": True}
VIDEO = {"s3d": (16, 224), "mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224)}  # frames, pixels
# Of each family of timm that `torch.fx` traces, the member with the least work.
TIMM = """
beit_base_patch16_224 cait_xxs24_224 coat_tiny convmixer_768_32 convnext_zepto_rms
cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121 dla46x_c
dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1
ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 flexivit_small
focalnet_tiny_srf gcvit_xxtiny ghostnet_050 gmlp_ti16_224 halonet_h1 hardcorenas_b hgnetv2_b0
hieradet_small hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3
inception_v4 lcnetv2_small legacy_seresnet18 legacy_xception levit_128s lowformer_b0
mambaout_femto maxvit_pico_rw_256 mnasnet_small mobilenetv3_small_050 mobileone_s1 nextvit_small
nf_regnet_b0 pit_ti_224 poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050
repvit_m1 res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42 sequencer2d_s
shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swinv2_tiny_window16_256 tnt_s_legacy_patch16_224 tresnet_m twins_pcpvt_small visformer_tiny
vit_small_resnet50d_s16_224 vit_srelpos_small_patch16_224 vitamin_small_224 volo_d1_224
xception41p xcit_nano_12_p8_224
""".split()  # noqa: SIM905


# Networks of one family that differ in depth, width or both.
PAIRS = """
vgg11+vgg13 vgg13+vgg16 vgg16+vgg19 vgg11+vgg19 vgg11_bn+vgg13_bn vgg13_bn+vgg16_bn
vgg16_bn+vgg19_bn vgg11_bn+vgg19_bn resnet18+resnet34 resnet50+resnet101 resnet101+resnet152
wide_resnet50_2+wide_resnet101_2 resnext50_32x4d+resnext101_32x8d regnet_y_400mf+regnet_y_800mf
regnet_x_1_6gf+regnet_x_3_2gf densenet121+densenet169 densenet169+densenet201
efficientnet_b0+efficientnet_b1 efficientnet_b1+efficientnet_b4
efficientnet_v2_s+efficientnet_v2_m mnasnet0_5+mnasnet1_0 shufflenet_v2_x0_5+shufflenet_v2_x1_0
convnext_tiny+convnext_small convnext_small+convnext_base vit_b_16+vit_l_16 vit_b_16+vit_b_32
swin_t+swin_s swin_s+swin_b swin_v2_t+swin_v2_s
mobilenet_v2?width_mult=0.5+mobilenet_v2?width_mult=1.0 fcn_resnet50+fcn_resnet101
deeplabv3_resnet50+deeplabv3_resnet101 resnet18+vgg11 mobilenet_v3_small+mobilenet_v3_large
""".split()  # noqa: SIM905


# --- networks ---------------------------------------------------------------------------------


def names_in(collection: str) -> list[str]:
    """Return the networks of a collection that `torch.fx` traces, in alphabetical order."""
    if collection == "timm":
        return [f"timm/{name}" for name in sorted(TIMM)]
    if collection == "pairs":
        return PAIRS
    if collection == "transformers":
        return [f"transformers/{name}" for name in sorted(_tiny_transformers().NAMES)]
    modules = (models, models.segmentation, models.video)
    return sorted(name for module in modules for name in models.list_models(module=module))


def build(name: str, seed: int = 0) -> nn.Module:
    """Return a network of torchvision or timm with random numbers in all of its tensors."""
    torch.manual_seed(seed)
    if name.startswith("transformers/"):
        kind, _, options = name.removeprefix("transformers/").partition("?")
        net = _tiny_transformers().build(kind, seed, **_whole(options))
    elif name.startswith("timm/"):
        import timm

        net = timm.create_model(name.removeprefix("timm/"), pretrained=False)
    else:
        name, _, options = name.partition("?")
        net = models.get_model(name, weights=None, **OPTIONS.get(name, {}), **_numbers(options))
    return randomise(net, example(name, net, 4), seed)


def _numbers(options: str) -> dict[str, float]:
    return {k: float(v) for k, v in (pair.split("=") for pair in options.split("&") if pair)}


def _whole(options: str) -> dict[str, int]:
    return {k: int(v) for k, v in _numbers(options).items()}


def _tiny_transformers() -> Any:
    path = Path(__file__).with_name("tiny_transformers.py")
    spec = importlib.util.spec_from_file_location("fxfuse_examples_tiny_transformers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(net: nn.Module, x: Example) -> list[Tensor]:
    """Return the tensors that a network makes of inputs, by their names if they have any."""
    return tensors_in(net(**x) if isinstance(x, dict) else net(x))


def example(name: str, net: nn.Module, count: int = 1, small: bool = False) -> Example:
    """Return random inputs of the size a network takes; smaller ones where it takes any size."""
    if name.startswith("transformers/"):
        return _tiny_transformers().inputs(net, max(count, 2))
    if name in models.list_models(module=models.video):
        frames, size = VIDEO.get(name, (8, 112))
        return torch.randn(count, 3, frames, size, size)
    if name.startswith("timm/"):
        return torch.randn(count, *net.default_cfg["input_size"])
    fixed = name.startswith(("vit", "maxvit")) or not small
    size = 299 if name == "inception_v3" else 224 if fixed else 64
    return torch.randn(count, 3, size, size)


@torch.no_grad()
def randomise(net: nn.Module, x: Example, seed: int = 0) -> nn.Module:
    """Draw all biases, affine parameters, statistics and heads anew; matrices keep their spread.

    Running variances are drawn around the second moments of what reaches each norm: with numbers
    from nowhere deep networks amplify rounding until nothing else is left.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator)

    for name, tensor in net.named_parameters():
        if tensor.dim() < 2 and name.endswith("bias"):
            tensor.copy_(draw(tensor.shape) * 0.2)
        elif tensor.dim() < 2 or not tensor.any() or tensor.std() < 1e-4:
            tensor.copy_(draw(tensor.shape) * 0.2 + (1 if tensor.dim() < 2 else 0))

    def settle(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        axes = [d for d in range(inputs[0].dim()) if d != 1]
        square = inputs[0].square().mean(axes)
        norm.running_mean.copy_(draw(square.shape) * 0.2 * square.sqrt())
        norm.running_var.copy_(square * (0.7 + 0.1 * draw(square.shape).abs()))

    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    run(net.eval(), x)
    for hook in hooks:
        hook.remove()
    return net


# --- what is measured -------------------------------------------------------------------------


@torch.no_grad()
def difference(before: nn.Module, after: nn.Module, x: Example) -> float:
    """Return the largest difference of any output, relative to the largest value in it."""
    worst = 0.0
    for a, b in zip(run(before, x), run(after, x), strict=True):
        worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    return worst


def _double(x: Example) -> Example:
    if isinstance(x, dict):
        return {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    return x.double()


def measure(name: str, fuse: bool) -> dict:
    """Return one row of the table, or the error that stands in its place."""
    net = build(name)
    x = example(name, net)
    with torch.no_grad():
        start = time.perf_counter()
        run(net, x)
        forward = time.perf_counter() - start
    start = time.perf_counter()
    spaces = fxfuse.find_spaces(net, x)
    row = {"model": name, "free": spaces.free_units, "seconds": time.perf_counter() - start}
    row["forwards"] = row["seconds"] / forward
    row["frozen"] = frozen(spaces)
    shuffled = fxfuse.permute(net, x, seed=1)
    row["permuted"] = difference(net, shuffled, example(name, net, 2))
    if row["permuted"] > 1e-4:  # a wrong answer, or rounding that the network amplifies?
        exact = copy.deepcopy(net).double(), copy.deepcopy(shuffled).double()
        with contextlib.suppress(RuntimeError):  # a cast that is written into the forward
            row["permuted64"] = difference(*exact, _double(example(name, net, 2)))
    if fuse:
        few = example(name, net, 8, small=True)
        start = time.perf_counter()
        fused = fxfuse.fuse([net, shuffled], few)
        row["fuse_seconds"] = time.perf_counter() - start
        row["fused"] = difference(net, fused, few)
        net.load_state_dict(fused.state_dict(), strict=True)
        if name.startswith("transformers/"):
            row["class"] = difference(net, fused, few)
            row.update(_other_sizes(name, net, few))
    return row


def _other_sizes(name: str, net: nn.Module, x: Example) -> dict[str, Any]:
    """Fuse a network with a deeper and with a wider one; return errors, or what was refused."""
    found: dict[str, Any] = {}
    for what in ("deeper=1", "wider=2"):
        key, other = what.partition("=")[0], build(f"{name}?{what}", seed=1)
        if key == "deeper":
            found[key] = _noted(lambda other=other: _balanced(other, net, x))
        found[f"{key} class"] = _noted(lambda other=other: _fused_class(other, net, x))
    return found


def _noted(measured: Callable[[], float]) -> float | str:
    """Return a figure, or what was refused."""
    try:
        return measured()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"[:90]


def _balanced(other: nn.Module, net: nn.Module, x: Example) -> float:
    """Return how far two balanced networks are from themselves."""
    return max(difference(m, b, x) for m, b in zip([other, net], fxfuse.balance([other, net], x)))


def _fused_class(other: nn.Module, net: nn.Module, x: Example) -> float:
    """Return how far a class that loads the fused network is from it."""
    fused = fxfuse.fuse([other, net], x)
    other.load_state_dict(fused.state_dict(), strict=True)
    return difference(other, fused, x)


def measure_pair(first: str, second: str) -> dict:
    """Return the row of two networks: errors of balancing, and whose class the fused one loads."""
    names = [first, second]
    nets = [build(name, seed) for seed, name in enumerate(names)]
    x = example(first, nets[0], 8, small=True)
    start = time.perf_counter()
    balanced = fxfuse.balance(nets, x)
    row = {"model": f"{first}+{second}"}
    row["balanced"] = [difference(net, other, x) for net, other in zip(nets, balanced)]
    fused, row["loads"] = fxfuse.fuse(nets, x), []
    for name, net in zip(names, nets):
        with contextlib.suppress(RuntimeError):
            net.load_state_dict(fused.state_dict(), strict=True)
            row["loads"].append(name)
    row["seconds"] = time.perf_counter() - start
    return row


def frozen(spaces: fx.Any) -> dict[str, int]:
    """Count the units that stay in place by reason, the network's own outputs left out."""
    reasons: Counter[str] = Counter()
    for part in spaces.frozen:
        if "output" not in part.reason:
            reasons[part.reason] += part.count
    return dict(reasons)


def show(row: dict) -> str:
    if "error" in row:
        return f"{row['model']:32} {row['error']}"
    if "balanced" in row:
        errors = " ".join(f"{e:.1e}" for e in row["balanced"])
        loads = ", ".join(row["loads"]) or "neither: each is deeper in another stage"
        return (
            f"{row['model']:32} balanced {errors}, fused loads into {loads}, {row['seconds']:.1f} s"
        )
    cells = f"{row['model']:32} {row['free']:7,} {row['permuted']:9.1e}"
    cells += f" {row['fused']:9.1e}" if "fused" in row else " " * 10
    cells += f" ({row['permuted64']:.0e} in float64)" if "permuted64" in row else ""
    cells += f" {row['seconds']:5.1f} s {row['forwards']:5.1f}x  "
    cells += "; ".join(f"{n:,} {why}" for why, n in row["frozen"].items())
    return cells + "".join(f"; {key}: {_short(row[key])}" for key in OTHERS if key in row)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.0e}"


def markdown(rows: list[dict]) -> str:
    """Return the table as Markdown; of pairs and errors, what was found in words."""
    models, others = ([r for r in rows if ("free" in r) == full] for full in (True, False))
    lines = ["| model | free units | permuted | fused with itself | seconds | fixed, and why |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    for row in models:
        why = "; ".join(f"{n:,} {reason}" for reason, n in row["frozen"].items())
        cells = [f"{row['free']:,}", *(_error(row, k) for k in ("permuted", "fused"))]
        why += "".join(f"; {key}: {_short(row[key])}" for key in OTHERS if key in row)
        lines.append(f"| {row['model']} | {' | '.join(cells)} | {row['seconds']:.1f} | {why} |")
    lines = lines if models else []
    if others:
        lines += [""] * bool(models) + ["| networks | result |", "| --- | --- |"]
        lines += [f"| {r['model']} | {show(r).removeprefix(r['model']).strip()} |" for r in others]
    return "\n".join(lines) + "\n"


def _error(row: dict, key: str) -> str:
    exact = f" ({row[key + '64']:.0e} in float64)" if key + "64" in row else ""
    return f"{row[key]:.1e}{exact}" if key in row else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument(
        "--collection",
        choices=["torchvision", "timm", "pairs", "transformers"],
        default="torchvision",
    )
    parser.add_argument("--fuse", action="store_true", help="also fuse with the permuted copy")
    parser.add_argument("--giants", action="store_true", help="also those above 600 M parameters")
    parser.add_argument("--write", type=Path, help="a .json or .md file for the table")
    args = parser.parse_args()
    names = args.names or [n for n in names_in(args.collection) if args.giants or n not in GIANTS]
    rows = []
    print(f"{'model':32} {'free':>7} {'permuted':>9} {'fused':>9} {'seconds':>7} forwards frozen")
    for name in names:
        try:
            row = measure_pair(*name.split("+")) if "+" in name else measure(name, args.fuse)
        except Exception as error:  # the table goes on, and says what happened
            lines = str(error).splitlines()
            row = {"model": name, "error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
        rows.append(row)
        print(show(row), flush=True)
        gc.collect()
        if args.write:
            text = (
                markdown(rows) if args.write.suffix == ".md" else json.dumps(rows, indent=1) + "\n"
            )
            args.write.write_text(text)


if __name__ == "__main__":
    main()
