"""A model card: what a fused network is, in the form that model hubs read.

Markdown with a head of YAML. What only a person knows, such as licences, is left to be filled in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from .report import Accuracy, Report


def card_of(
    report: Report,
    name: str,
    parents: Mapping[str, str],
    accuracy: Mapping[str, Accuracy],
    facts: Mapping[str, str],
) -> str:
    """Return the card of a fused network.

    Args:
        report: What the fusion did.
        name: The file of the network.
        parents: Where each network came from, by its name.
        accuracy: Accuracy in percent of each network, by name, or accuracy and loss.
        facts: Other facts, as blocks of text, by name.
    """
    sections = [
        _head(),
        f"# {_plain(name)}",
        f"One network, fused from {len(parents)} by fxfuse {report.versions.get('fxfuse', '')}.",
        "## Parents",
        _parents(report, parents),
    ]
    if report.files:
        sections += ["Files they were read from, with their SHA-256:", _files(report)]
    sections += ["## Figures", *_figures(report, accuracy), "## Use"]
    sections.append(f"```python\nimport fxfuse\n\nnet = fxfuse.load({json.dumps(name)})\n```")
    for title, text in facts.items():
        block = text.rstrip().replace("```", "")
        sections += [f"## {title.capitalize()}", f"```yaml\n{block}\n```"]
    sections += ["## Made with", ", ".join(f"{k} {v}" for k, v in report.versions.items())]
    sections += ["## Licence", "TODO: of this network, of its parents, and of the data."]
    return "\n\n".join(sections) + "\n"


def _head() -> str:
    """Return the YAML that hubs read."""
    return """---
license: other  # TODO
license_name: TODO
base_model: []  # TODO: the parents, as the hub names them
base_model_relation: merge
library_name: pytorch
tags:
  - merge
  - fxfuse
---"""


def _parents(report: Report, parents: Mapping[str, str]) -> str:
    rows = ["| network | weight | from |", "| --- | ---: | --- |"]
    for (name, reference), weight in zip(parents.items(), report.weights):
        rows.append(f"| {_plain(name)} | {weight:.4g} | {_plain(reference)} |")
    return "\n".join(rows)


def _files(report: Report) -> str:
    return "\n".join(f"- {_plain(path)}: `{digest}`" for path, digest in report.files.items())


def _figures(report: Report, accuracy: Mapping[str, Accuracy]) -> list[str]:
    lines = list(report.warnings) or [report.verdict] * bool(report.verdict)
    if report.costs:
        lines.append(_sizes(report))
    if not accuracy:
        return [*lines, "No labels were at hand. TODO: accuracy on a test set."]
    rows = ["| network | accuracy |", "| --- | ---: |"]
    for name, value in accuracy.items():
        percent = value[0] if isinstance(value, tuple) else value
        rows.append(f"| {_plain(name)} | {percent:.2f} % |")
    said = "On the samples it was fused on, whose labels only these figures used:"
    return [*lines, said, "\n".join(rows)]


def _sizes(report: Report) -> str:
    """Return what each network, their ensemble and the fused one cost for one sample."""
    rows = ["| network | parameters | multiply-adds |", "| --- | ---: | ---: |"]
    rows += [f"| {_plain(name)} | {size} | {work} |" for name, size, work, _ in report.rows]
    return "\n".join(rows)


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is, in one cell."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#" else c for c in text.replace("\n", " "))
