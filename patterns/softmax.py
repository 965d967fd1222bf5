"""Softmax and its logarithm, written out, and softmax of scores and a bias."""

from fusion.dims import lower, product
from fusion.language import either, exp, log, maximum, pattern, softmax, total


@pattern(x="... T")
def stable_softmax(x):
    """exp(x - max(x)) / Σ exp(x - max(x)) along one axis (Bridle 1990, eq. 2): a softmax, written out."""
    return softmax(x)


@pattern(x="... T")
def stable_log_softmax(x):
    """x - max(x) - log Σ exp(x - max(x)) along one axis (Bridle 1990, eq. 2): the logarithm of a softmax, written out.

    It is finite where the softmax is 0; log(softmax(x)) is another function.
    """
    d = x - maximum(x)
    once = d - log(total(exp(d)))
    twice = x - maximum(x) - log(total(exp(x - maximum(x))))
    return either(once, twice)


@pattern(x="... T", bias="... T")
def bias_softmax(x, bias):
    """Softmax of scores and a mask or bias that is the same for some of them (Vaswani et al. 2017, section 3.2.3)."""
    return softmax(x + bias)


def _along(found, op):
    """x as the result lies, and the axis along which it is normalised."""
    x, axis = op.unmoved(found.x, "T")
    found.require(axis == found.rank - 1 or found.opset >= 13, "below opset 13 the operator flattens from its axis on")
    return x, axis


@stable_softmax.emit("onnx", "ort-cpu", "ort-cuda", last=True)
def _(found, op):
    x, axis = _along(found, op)
    return op.lying(op.guarded(op.Softmax(x, axis=axis)))


@stable_log_softmax.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    x, axis = _along(found, op)
    return op.lying(op.LogSoftmax(x, axis=axis))


@bias_softmax.emit("ort-cuda", last=True)
def _(found, op):
    """The kernel reuses each row of the bias for as many rows of x in turn, or all of them again and again."""
    x, last = found.x, found.rank - 1
    found.require(found.state.letters["T"] == (last,), "it runs along another axis than the last")
    found.require(all(x.depends(axis) or x.shape[axis] == 1 for axis in range(last + 1)), "x is broadcast")
    own = [found.bias.depends(axis) for axis in range(last) if x.shape[axis] != 1]
    again = own == sorted(own)
    found.require(again or own == sorted(own, reverse=True), "the bias is broadcast between axes that it has")
    found.require(lower(product(x.shape)) > 0, "the kernel divides by sizes, and one of them may be 0")
    bias, _ = op.stored(found.bias, range, keep=1)
    return op.microsoft.BiasSoftmax(op.arranged(x), bias, axis=last, is_inner_broadcast=int(not again))
