"""Gelu in its three forms, Gelu with the bias of the projection before it, Swish, Mish, and their piecewise kin."""

from math import pi

from onnx import TensorProto

from fusion.language import clamp, either, erf, exp, log, pattern, relu, scalar, sigmoid, sqrt, tanh
from fusion.schema import attribute


@pattern(x="...")
def gelu(x):
    """Gaussian error linear unit, exact: x Φ(x) (Hendrycks & Gimpel 2016, eq. 2)."""
    return 0.5 * x * (1 + erf(x / sqrt(2)))


@pattern(x="...")
def gelu_tanh(x):
    """Gelu by its tanh approximation (Hendrycks & Gimpel 2016, section 2); never exchanged for the exact form."""
    return 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))


@pattern(x="...", alpha=scalar())
def swish(x, alpha):
    """x σ(α x): SiLU for α = 1 (Elfwing et al. 2017), the sigmoid Gelu for α = 1.702 (Hendrycks & Gimpel 2016)."""
    return either(x * sigmoid(alpha * x), x / (1 + exp(-alpha * x)))


@pattern(gate="...", up="...", alpha=scalar())
def swiglu(gate, up, alpha):
    """Swish of a gate times a value (Shazeer 2020, eq. 6)."""
    return swish(gate, alpha) * up


@pattern(x="...")
def logistic(x):
    """σ(x) written out (Verhulst 1845); exp(-x) may overflow, and then both are 0."""
    return 1 / (1 + exp(-x))


@pattern(x="...")
def softplus(x):
    """log(1 + exp(x)) (Dugas et al. 2000, eq. 5), written so that nothing overflows."""
    return relu(x) + log(1 + exp(-abs(x)))


@pattern(x="...")
def mish(x):
    """x tanh(softplus(x)) (Misra 2019, eq. 1); where exp(x) overflows, it is x anyhow."""
    return either(x * tanh(softplus(x)), x * tanh(log(1 + exp(x))))


@pattern(x="...", alpha=scalar(), beta=scalar())
def hard_sigmoid(x, alpha, beta):
    """α x + β clamped to [0, 1] (Courbariaux et al. 2015, eq. 3)."""
    return clamp(alpha * x + beta)


@pattern(x="...")
def hard_swish(x):
    """x relu6(x + 3) / 6 (Howard et al. 2019, section 5.2)."""
    return x * clamp(x / 6 + 0.5)


@pattern(left="... P", right="... P", bias_left="P", bias_right="P")
def bias_split_gelu(left, right, bias_left, bias_right):
    """One half of a projection with its bias times the Gelu of the other: GeGLU (Shazeer 2020, eq. 6)."""
    return (left + bias_left) * gelu(right + bias_right)


@pattern(x="... D", bias="D")
def bias_gelu(x, bias):
    """Gelu of a projection and its bias, (D,)."""
    return gelu(x + bias)


@pattern(x="... D", bias="D")
def bias_gelu_tanh(x, bias):
    """Tanh Gelu of a projection and its bias, (D,)."""
    return gelu_tanh(x + bias)


def _gelu(approximate):
    def read(node, rank):
        return {"x": node.inputs[0]} if attribute(node, "approximate") == approximate else None

    return read


gelu.reads("Gelu")(_gelu(b"none"))
gelu_tanh.reads("Gelu")(_gelu(b"tanh"))


@gelu.reads("com.microsoft::Gelu")
def _(node, rank):
    return {"x": node.inputs[0]}


@gelu_tanh.reads("com.microsoft::FastGelu")
def _(node, rank):
    return {"x": node.inputs[0]} if node.input(1) is None else None


@softplus.reads("Softplus")
def _(node, rank):
    return {"x": node.inputs[0]}


def _require_single(found):
    found.require(found.dtype != TensorProto.DOUBLE, "the operator's numbers are in single precision")


@gelu.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    return op.Gelu(op.arranged(found.x))


@gelu.emit("ort-cpu", "ort-cuda")
def _(found, op):
    return op.microsoft.Gelu(op.arranged(found.x))


@gelu_tanh.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    return op.Gelu(op.arranged(found.x), approximate="tanh")


@gelu_tanh.emit("ort-cpu", "ort-cuda")
def _(found, op):
    _require_single(found)
    found.require(found.rank >= 1, "the kernel takes no scalar")
    return op.microsoft.FastGelu(op.arranged(found.x))


@swish.emit("onnx")
def _(found, op):
    return op.Swish(op.arranged(found.x), alpha=found.alpha)


@swiglu.emit("onnx")
def _(found, op):
    return op.SwiGLU(found.gate, found.up, alpha=found.alpha)


@swish.emit("ort-cpu", "ort-cuda")
def _(found, op):
    return op.microsoft.QuickGelu(op.arranged(found.x), alpha=found.alpha)


@logistic.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    return op.Sigmoid(found.x)


@softplus.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    return op.Softplus(found.x)


@mish.emit("onnx")
def _(found, op):
    return op.Mish(found.x)


@hard_sigmoid.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    return op.HardSigmoid(found.x, alpha=found.alpha, beta=found.beta)


@hard_swish.emit("onnx", "ort-cuda")
def _(found, op):
    _require_single(found)
    return op.HardSwish(found.x)


@bias_gelu.emit("ort-cpu", "ort-cuda")
def _(found, op):
    return op.microsoft.BiasGelu(found.x, found.bias)


@bias_gelu_tanh.emit("ort-cpu", "ort-cuda")
def _(found, op):
    _require_single(found)
    return op.microsoft.FastGelu(found.x, found.bias)


@bias_split_gelu.emit("ort-cuda")
def _(found, op):
    x, bias = found.left.appended(found.right), found.bias_left.appended(found.bias_right)
    found.require(x is not None and bias is not None, "these are no halves of one projection and its bias")
    wide = found.rank == 3 and found.size("P") in {1280, 2560, 5120}
    found.require(wide, "the kernel takes (N, S, D) with D = 2560, 5120 or 10240")
    return op.microsoft.BiasSplitGelu(op.arranged(x), op.arranged(bias))
