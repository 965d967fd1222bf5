"""Layer and RMS normalization over trailing axes, alone or with the residual before them."""

from fusion.language import keep, mean, optional, pattern, scalar, sqrt
from fusion.schema import attribute


@pattern(x="... D", scale=optional("D"), eps=scalar(0))
def rms_norm(x, scale, eps):
    """Root mean square normalization (Zhang & Sennrich 2019, eq. 4)."""
    return x / sqrt(mean(x**2) + eps) * scale


@pattern(x="... D", scale=optional("D"), bias=optional("D"), eps=scalar(0))
def layer_norm(x, scale, bias, eps):
    """Layer normalization (Ba, Kiros & Hinton 2016, eq. 4); D may be several trailing axes."""
    return rms_norm(x - mean(x), scale, eps) + bias


@pattern(x="... D", skip="... D", shift=optional("D"), scale="D", bias=optional("D"), eps=scalar(0))
def skip_layer_norm(x, skip, shift, scale, bias, eps):
    """Layer normalization of a residual sum; the sum is an output too. `shift` is the bias of the last projection."""
    total = x + shift + skip
    return layer_norm(total, scale, bias, eps), keep(total)


@pattern(x="... D", skip="... D", shift=optional("D"), scale="D", eps=scalar(0))
def skip_rms_norm(x, skip, shift, scale, eps):
    """RMS normalization of a residual sum; the sum is an output too."""
    total = x + shift + skip
    return rms_norm(total, scale, eps), keep(total)


@layer_norm.reads("LayerNormalization")
def _(node, rank):
    count = rank - attribute(node, "axis") % rank
    names = ("x", "scale", "bias")
    return {name: node.input(slot) for slot, name in enumerate(names)} | {"eps": attribute(node, "epsilon"), "D": count}


@rms_norm.reads("RMSNormalization", "SimplifiedLayerNormalization")
def _(node, rank):
    count = rank - attribute(node, "axis") % rank
    return {"x": node.input(0), "scale": node.input(1), "eps": attribute(node, "epsilon"), "D": count}


@layer_norm.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    scale = op.arranged(found.scale) or op.ones("D")
    return op.LayerNormalization(
        op.arranged(found.x), scale, op.arranged(found.bias), axis=-found.count("D"), epsilon=found.eps
    )


@rms_norm.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    scale = op.arranged(found.scale) or op.ones("D")
    return op.RMSNormalization(op.arranged(found.x), scale, axis=-found.count("D"), epsilon=found.eps)


@rms_norm.emit("ort-cpu", "ort-cuda")
def _(found, op):
    scale = op.arranged(found.scale) or op.ones("D")
    return op.SimplifiedLayerNormalization(op.arranged(found.x), scale, axis=-found.count("D"), epsilon=found.eps)


@skip_layer_norm.emit("ort-cpu", "ort-cuda")
def _(found, op):
    found.require(found.rank in (2, 3) and found.count("D") == 1, "the kernel takes (B, S, D) or (S, D)")
    inputs = (found.x, op.broadcast(found.skip), found.scale, found.bias, found.shift)
    normed, _, _, total = op.microsoft.SkipLayerNormalization(*inputs, outputs=4, epsilon=found.eps)
    return normed, total


@skip_rms_norm.emit("ort-cpu", "ort-cuda")
def _(found, op):
    found.require(found.rank in (2, 3) and found.count("D") == 1, "the kernel takes (B, S, D) or (S, D)")
    inputs = (found.x, op.broadcast(found.skip), found.scale, found.shift)
    normed, _, _, total = op.microsoft.SkipSimplifiedLayerNormalization(*inputs, outputs=4, epsilon=found.eps)
    return normed, total
