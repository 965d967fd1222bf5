"""Write a synthetic graph: many erf-Gelus among other nodes, for timing the rewriter without a model.

python tools/synthetic.py OUT.onnx [--gelus 10000] [--nodes 100000]
"""

from __future__ import annotations

import argparse

import onnx
from onnx import TensorProto, helper


def build(gelus: int, nodes: int) -> onnx.ModelProto:
    """A chain of `gelus` erf-Gelus of five nodes each, padded with Relu and Sigmoid to `nodes` nodes, opset 17."""
    chain: list[onnx.NodeProto] = []
    value = "x"
    filler = (nodes - 5 * gelus) // gelus
    for index in range(gelus):
        for step in range(filler):
            op = "Relu" if step % 2 else "Sigmoid"
            chain.append(helper.make_node(op, [value], [f"f{index}_{step}"], name=f"filler_{index}_{step}"))
            value = f"f{index}_{step}"
        d, e, a, m, y = (f"{letter}{index}" for letter in "deamy")
        chain.append(helper.make_node("Div", [value, "sqrt2"], [d], name=f"div_{index}"))
        chain.append(helper.make_node("Erf", [d], [e], name=f"erf_{index}"))
        chain.append(helper.make_node("Add", [e, "one"], [a], name=f"add_{index}"))
        chain.append(helper.make_node("Mul", [value, a], [m], name=f"mul_{index}"))
        chain.append(helper.make_node("Mul", [m, "half"], [y], name=f"half_{index}"))
        value = y
    graph = helper.make_graph(
        chain,
        "synthetic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", 64])],
        [
            helper.make_tensor("sqrt2", TensorProto.FLOAT, [], [2**0.5]),
            helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
            helper.make_tensor("half", TensorProto.FLOAT, [], [0.5]),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    """Parse the command line and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--gelus", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=100_000)
    args = parser.parse_args()
    onnx.save(build(args.gelus, args.nodes), args.out)


if __name__ == "__main__":
    main()
