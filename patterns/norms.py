"""Layer and RMS normalization over trailing axes, alone or with the residual before them."""

from fusion.language import axes, keep, mean, optional, pattern, scalar, sqrt
from fusion.schema import attribute


@pattern(x="... D", scale=optional("D"), eps=scalar(0))
def rms_norm(x, scale, eps):
    """Root mean square normalization (Zhang & Sennrich 2019, eq. 4)."""
    return x / sqrt(mean(x**2) + eps) * scale


@pattern(x="... D", scale=optional("D"), bias=optional("D"), eps=scalar(1e-20))
def layer_norm(x, scale, bias, eps):
    """Layer normalization (Ba, Kiros & Hinton 2016, eq. 4); D may be several trailing axes.

    Without eps equal numbers give rounding noise divided by itself, which differs from kernel to kernel.
    """
    return rms_norm(x - mean(x), scale, eps) + bias


@pattern(x="N C S", scale="C", bias=optional("C"), eps=scalar(9e-6))
def instance_norm(x, scale, bias, eps):
    """Instance normalization (Ulyanov, Vedaldi & Lempitsky 2016, eq. 3): group normalization of one channel a group.

    With a smaller eps kernels that compute a x + b, a = scale / sqrt(v + eps), lose digits where v is nearly 0.
    """
    d = x - mean(x)
    return d / sqrt(mean(d**2) + eps) * axes(scale, "C -> C 1") + axes(bias, "C -> C 1")


@pattern(x="N (G C) S", scale="(G C)", bias=optional("(G C)"), eps=scalar(1e-20))
def group_norm(x, scale, bias, eps):
    """Group normalization (Wu & He 2018, eq. 1 to 7) of several channels a group."""
    x = axes(x, "N (G C) S -> N G C S")
    d = x - mean(x, "C S")
    normed = d / sqrt(mean(d**2, "C S") + eps)
    scaled = normed * axes(scale, "(G C) -> G C 1") + axes(bias, "(G C) -> G C 1")
    return axes(scaled, "N G C S -> N (G C) S")


@pattern(x="... D", skip="... D", shift=optional("D"), scale="D", bias=optional("D"), eps=scalar(1e-20))
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


@instance_norm.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    found.require(
        found.least("S") > 1, "of one element x - mean(x) is exactly 0, and a x + b with a = scale / sqrt(eps) not"
    )
    bias = op.arranged(found.bias) or op.zeros("C")
    return op.InstanceNormalization(op.arranged(found.x), op.arranged(found.scale), bias, epsilon=found.eps)


@instance_norm.emit("onnx", "ort-cpu", "ort-cuda")
def _(found, op):
    normed = op.InstanceNormalization(op.arranged(found.x), op.ones("C"), op.zeros("C"), epsilon=found.eps)
    scaled = op.Mul(normed, op.before(found.scale, found.count("S")))
    return op.Add(scaled, op.before(found.bias, found.count("S"))) if found.bias else scaled


@group_norm.emit("onnx")
def _(found, op):
    bias = op.arranged(found.bias) or op.zeros("(G C)")
    groups = {"num_groups": found.size("G"), "epsilon": found.eps}
    return op.GroupNormalization(op.arranged(found.x), op.arranged(found.scale), bias, **groups)


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
