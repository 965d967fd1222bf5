#!/usr/bin/env python
"""Write down what the installed onnxruntime registers, for machines that have none.

    python tools/snapshot_kernels.py [OUT.json]
    python tools/snapshot_kernels.py --cuda [OUT.json]     # needs a CUDA build that can load its providers

The defaults are the files in the package. Only operators of the standard and of com.microsoft are kept. For operators
without a kernel of their own for a floating type the runtime itself is asked whether it loads them all the same; for
CUDA only the kernels are written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusion import registry
from fusion.registry import FLOATING, NEWEST, Installed, Kernel, Schema
from fusion.targets import target_named

DOMAINS = ("", "com.microsoft")
CPU = target_named("ort-cpu")
OLDEST = 7  # onnxruntime promises nothing below
DATA = Path(registry.__file__).parent / "data"
PACKAGED, PACKAGED_CUDA = DATA / registry.SNAPSHOT, DATA / registry.CUDA_KERNELS


class Types:
    """The sets of types, each written once."""

    def __init__(self) -> None:
        self.index: dict[frozenset[str], int] = {}

    def named(self, types: Any) -> dict[str, int]:
        return {name: self.index.setdefault(allowed, len(self.index)) for name, allowed in sorted(types.items())}


def snapshot(installed: Installed) -> str:
    """Return the registry as JSON, one operator per line."""
    types = Types()
    operators = {}
    for domain, op in installed.operators():
        if domain in DOMAINS:
            operators[f"{domain}::{op}"] = _operator(installed, domain, op, types)
    lines = [f"{json.dumps(name)}:{json.dumps(entry, separators=(',', ':'))}" for name, entry in operators.items()]
    head = {"version": installed.version, "newest_opset": installed.newest_opset}
    listed = json.dumps([sorted(kinds) for kinds in types.index], separators=(",", ":")).replace("],[", "],\n[")
    return f'{json.dumps(head)[:-1]},\n"types":{listed},\n"operators":{{\n' + ",\n".join(lines) + "\n}}\n"


def _operator(installed: Installed, domain: str, op: str, types: Types) -> dict[str, Any]:
    schemas = installed.versions(op, domain)
    entry: dict[str, Any] = {
        "schemas": {str(since): _schema(schema, types) for since, schema in sorted(schemas.items())}
    }
    kernels = {
        provider: [
            [kernel.first, 0 if kernel.last == NEWEST else kernel.last, types.named(kernel.types)] for kernel in found
        ]
        for provider in installed.providers
        if (found := installed.kernels(op, domain, provider))
    }
    if kernels:
        entry["kernels"] = kernels
    loads = {str(data_type): found for data_type in FLOATING if (found := _loads(installed, domain, op, data_type))}
    if loads:
        entry["loads"] = loads
    return entry


def _schema(schema: Schema, types: Types) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "inputs": schema.inputs,
        "outputs": schema.outputs,
        "required": schema.required,
        "results": schema.results,
        "types": types.named(schema.types),
    }
    fields |= {flag: True for flag in ("deprecated", "variadic", "mixed") if getattr(schema, flag)}
    if schema.defaults:
        fields["defaults"] = {name: value.hex() for name, value in sorted(schema.defaults.items())}
    if schema.needed:
        fields["needed"] = dict(sorted(schema.needed.items()))
    if schema.optional:
        fields["optional"] = sorted(schema.optional)
    return fields


def _loads(installed: Installed, domain: str, op: str, data_type: int) -> list[list[int]]:
    """Return the ranges of opsets in which the runtime loads the operator without a kernel for a floating type.

    Every floating input has that type. Each opset is tried: the operators that a definition consists of, and Cast, have
    kernels of their own for some opsets and not for others.
    """
    ranges: list[list[int]] = []
    opsets = sorted(installed.versions(op, domain)) if domain else range(OLDEST, installed.newest_opset + 1)
    for opset in opsets:
        schema = installed.schema(op, domain, opset)
        if schema is None or schema.deprecated:
            continue
        name = registry.type_name(data_type)
        inputs = [
            data_type if name in schema.types.get(kind, frozenset({kind})) else None
            for _, kind in schema.inputs[: schema.required]
        ]
        if data_type not in inputs or CPU.route(op, domain, opset, inputs) != "expanded":
            continue
        if ranges and ranges[-1][1] == opset - 1:
            ranges[-1][1] = opset
        else:
            ranges.append([opset, opset])
    return ranges


def listed(installed: Installed, provider: str) -> str:
    """Return a provider's kernels as JSON, as `registry.Listed` reads it, one operator per line."""
    sets: dict[str, int] = {}
    lines = []
    for domain, op in installed.operators():
        kernels = _joined(installed.kernels(op, domain, provider)) if domain in DOMAINS else []
        written = [
            [first, 0 if last == NEWEST else last, {name: sets.setdefault(kinds, len(sets)) for name, kinds in own}]
            for first, last, own in kernels
        ]
        if written:
            name = f"{domain}::{op}" if domain else op
            lines.append(f"{json.dumps(name)}:{json.dumps(written, separators=(',', ':'))}")
    head = {"label": installed.label, "newest_opset": installed.newest_opset}
    types = json.dumps(list(sets), indent=0)
    return f'{json.dumps(head)[:-1]},\n"types":{types},\n"kernels":{{\n' + ",\n".join(lines) + "\n}}\n"


def _joined(kernels: Iterable[Kernel]) -> list[tuple[int, int, list[tuple[str, str]]]]:
    """Return kernels as lists of types; those that differ only in the types of one variable are one."""
    found: list[tuple[int, int, dict[str, frozenset[str]]]] = []
    for kernel in kernels:
        for first, last, own in found:
            differing = [name for name in own if own[name] != kernel.types.get(name)]
            if (first, last, set(own)) == (kernel.first, kernel.last, set(kernel.types)) and len(differing) < 2:
                own.update({name: own[name] | kernel.types[name] for name in differing})
                break
        else:
            found.append((kernel.first, kernel.last, dict(kernel.types)))
    short = lambda kinds: " ".join(sorted(kind[len("tensor(") : -1] for kind in kinds if kind.startswith("tensor(")))  # noqa: E731
    return [
        (first, last, [(name, short(own[name])) for name in sorted(own)])
        for first, last, own in sorted(found, key=lambda k: k[:2])
    ]


def main() -> None:
    """Write the snapshot."""
    cuda, given = "--cuda" in sys.argv, [Path(argument) for argument in sys.argv[1:] if argument != "--cuda"]
    destination = given[0] if given else PACKAGED_CUDA if cuda else PACKAGED
    text = listed(Installed(), registry.CUDA) if cuda else snapshot(Installed())
    destination.write_text(text, "utf-8")
    print(f"{destination}: {len(text):,} bytes")


if __name__ == "__main__":
    main()
