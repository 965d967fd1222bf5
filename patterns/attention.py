"""Scaled dot-product attention: on its own, with heads, and with the projections of self-attention."""

from fusion.patterns.linear import linear

from fusion.language import along, axes, optional, pattern, rest, scalar, softmax


@pattern(q="... S D", k="... T D", v="... T E", bias=rest("... S T"), scale=scalar())
def sdpa(q, k, v, bias, scale):
    """softmax(scale q kᵀ + bias) v (Vaswani et al. 2017, eq. 1). `bias` is every mask and bias, in order."""
    return softmax(scale * (q @ axes(k, "... T D -> ... D T")) + bias) @ v


@pattern(q="B S (H D)", k="B T (H|1 D)", v="B T (H|1 E)", bias=rest("B H S T"), scale=scalar())
def multi_head_attention(q, k, v, bias, scale):
    """Attention over heads that lie side by side in the hidden axis (Vaswani et al. 2017, section 3.2.2)."""
    q, k = axes(q, "B S (H D) -> B H S D"), axes(k, "B T (H D) -> B H T D")
    v = axes(v, "B T (H E) -> B H T E")
    return axes(sdpa(q, k, v, bias, scale), "B H S E -> B S (H E)")


@pattern(
    x="B S C",
    wq="C (H D)", wk="C (H D)", wv="C (H E)",
    bq=optional("(H D)"), bk=optional("(H D)"), bv=optional("(H E)"),
    bias=rest("B H S T"), scale=scalar(),
)  # fmt: skip
def self_attention(x, wq, wk, wv, bq, bk, bv, bias, scale):
    """Multi-head attention of projections of one input (Vaswani et al. 2017, section 3.2.2)."""
    q = linear(x, wq, bq)
    k, v = linear(along(x, "B T C"), wk, bk), linear(along(x, "B T C"), wv, bv)
    return multi_head_attention(q, k, v, bias, scale)


def _masks(found, op, causal):
    """What is to be added to scores, and the attribute that hides later keys."""
    return (None, {causal: 1}) if op.is_causal(found.bias) else (op.additive(found.bias), {})


def _standard(found, op, *, hidden_rows=True):
    found.require_one_dtype()
    bias, flags = _masks(found, op, "is_causal")
    found.require(
        hidden_rows or bias is None,
        "onnxruntime's kernel gives 0 in rows masked everywhere, the standard gives their mean",
    )
    shared, (k, v) = op.unrepeated("H", (found.k, "B T (H D)"), (found.v, "B T (H E)"))
    heads = {"q_num_heads": found.size("H"), "kv_num_heads": shared, "scale": found.scale}
    return op.guarded(op.Attention(op.arranged(found.q), k, v, bias, **heads, **flags))


multi_head_attention.emit("onnx")(_standard)


@multi_head_attention.emit("ort-cpu")
def _(found, op):
    return _standard(found, op, hidden_rows=False)


@multi_head_attention.emit("ort-cpu", "ort-cuda")
def _(found, op):
    found.require(found.scale != 0.0, "the kernel reads a scale of 0 as none given")
    found.require_one_dtype()
    forms = [[(found.k, "B T (H D)"), (found.v, "B T (H E)")]]
    if found.k.shape[2] == found.v.shape[2]:  # the kernel takes keys and values by head where their sizes are equal
        forms.append([(found.k, "B H T D"), (found.v, "B H T E")])
    q, (k, v) = op.arranged(found.q), op.fewest(*forms)
    bias, flags = _masks(found, op, "unidirectional")
    heads = {"num_heads": found.size("H"), "scale": found.scale}
    return op.guarded(op.microsoft.MultiHeadAttention(q, k, v, None, None, bias, **heads, **flags))


@self_attention.emit("ort-cpu", "ort-cuda")
def _(found, op):
    found.require(found.scale != 0.0, "the kernel reads a scale of 0 as none given")
    found.require_one_dtype()
    weights = op.packed(found.wq, found.wk, found.wv, axis=1)
    biases = op.packed(found.bq, found.bk, found.bv, axis=0, absent=(found.wq, found.wk, found.wv))
    heads = {"num_heads": found.size("H"), "scale": found.scale}
    if found.wq.shape[1] != found.wv.shape[1]:
        heads["qkv_hidden_sizes"] = [capture.shape[1] for capture in (found.wq, found.wk, found.wv)]
    bias, flags = _masks(found, op, "unidirectional")
    return op.guarded(op.microsoft.Attention(found.x, weights, biases, None, None, bias, **heads, **flags))
