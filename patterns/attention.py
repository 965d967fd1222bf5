"""Scaled dot-product attention: on its own, with heads, and with the projections of self-attention."""

from fusion.patterns.linear import linear

from fusion.language import along, axes, optional, pattern, rest, scalar, softmax, tanh


@pattern(q="... S D", k="... T D", v="... T E", factor=optional("... S|1"), bias=rest("... S T"), scale=scalar())
def sdpa(q, k, v, factor, bias, scale):
    """softmax(scale q kᵀ + bias) v (Vaswani et al. 2017, eq. 1). `bias` is every mask and bias, in order.

    Scores may have a factor that is the same for all keys: cosine attention has a learned one (Liu et al. 2022, eq. 2).
    """
    scores = scale * axes(factor, "... S -> ... S 1") * (q @ axes(k, "... T D -> ... D T"))
    return softmax(scores + bias) @ v


@pattern(
    q="B S (H D)", k="B T (H|1 D)", v="B T (H|1 E)",
    factor=optional("B|1 H|1 S|1"), bias=rest("B H S T"), scale=scalar(),
)  # fmt: skip
def multi_head_attention(q, k, v, factor, bias, scale):
    """Attention over heads that lie side by side in the hidden axis (Vaswani et al. 2017, section 3.2.2)."""
    q, k = axes(q, "B S (H D) -> B H S D"), axes(k, "B T (H D) -> B H T D")
    v = axes(v, "B T (H E) -> B H T E")
    return axes(sdpa(q, k, v, factor, bias, scale), "B H S E -> B S (H E)")


@pattern(
    q="B S (H D)", k="B T (H|1 D)", v="B T (H|1 E)",
    factor=optional("B|1 H|1 S|1"), bias=rest("B H S T"), scale=scalar(), cap=scalar(),
)  # fmt: skip
def capped_attention(q, k, v, factor, bias, scale, cap):
    """Attention over heads whose scores are capped before masks: cap tanh(scale q kᵀ) (Gemma Team 2024, section 2).

    `scale` is that of the scores, divided by the cap.
    """
    q, k = axes(q, "B S (H D) -> B H S D"), axes(k, "B T (H D) -> B H D T")
    v, factor = axes(v, "B T (H E) -> B H T E"), axes(factor, "B H S -> B H S 1")
    scores = cap * tanh(scale * factor * (q @ k))
    return axes(softmax(scores + bias) @ v, "B H S E -> B S (H E)")


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
    return multi_head_attention(q, k, v, None, bias, scale)


def _masks(found, op, causal, past=()):
    """What is to be added to scores, and the attribute that hides later keys."""
    if op.is_causal(found.bias, past[0].shape[1] if past else 0):
        return None, {causal: 1}
    return op.additive(found.bias), {}


def _cache(op, **options):
    """What keys and values are appended to, where the kernels take that by themselves and give the whole back."""
    return op.split_cache("T", k="B H T D", v="B H T E", **options)


def _queries(found, op):
    """Queries, times what scores are multiplied by."""
    return op.scaled(found.q, found.factor, "B H S D") if found.factor else op.arranged(found.q)


def _standard(found, op, past=(), *, hidden_rows=True):
    cap = getattr(found, "cap", None)
    scale = found.scale if cap is None else found.scale * cap
    found.require(scale > 0.0, "the operator takes roots of the scale, and reads 0 as none given")
    softmax_in = found.softmax_dtype()
    bias, flags = _masks(found, op, "is_causal", past)
    found.require(bias is None or not found.adds_wide, "masks are added in float, by the operator in half precision")
    found.require(
        hidden_rows or bias is None,
        "onnxruntime's kernel gives 0 in rows masked everywhere, the standard gives their mean",
    )
    caches = zip(past, ("B H T D", "B H T E"), strict=False)
    shared, (k, v, *caches) = op.unrepeated("H", (found.k, "B T (H D)"), (found.v, "B T (H E)"), *caches)
    heads = {"q_num_heads": found.size("H"), "kv_num_heads": shared, "scale": scale}
    if cap is not None:
        heads["softcap"] = abs(cap)
    if softmax_in != found.dtype:
        heads["softmax_precision"] = softmax_in
    attended, *present = op.Attention(_queries(found, op), k, v, bias, *caches, outputs=3, **heads, **flags)
    return op.guarded(attended), *present[: len(past)]


def _require_wide(found, op, bias, flags):
    """Whatever kernel is chosen at run time computes a softmax in float that the model computes so.

    TensorRT's, which sum in half precision with CUDA, take neither a bias nor a causal mask.
    """
    safe = found.softmax_dtype() == found.dtype or op.provider != "CUDAExecutionProvider" or bias or flags
    found.require(bool(safe), "without a mask a kernel may compute the softmax in half precision")


def _multi_head(found, op, past=()):
    found.require(found.scale != 0.0, "the kernel reads a scale of 0 as none given")
    forms = [[(found.k, "B T (H D)"), (found.v, "B T (H E)")]]
    alike = found.k.shape[2] == found.v.shape[2]
    if alike:  # the kernel takes keys and values by head where their sizes are equal
        forms.append([(found.k, "B H T D"), (found.v, "B H T E")])
    found.require(alike or not past, "the kernel takes no cache of keys and values of different sizes")
    q, (k, v) = _queries(found, op), op.fewest(*forms)
    caches = op.fewest(list(zip(past, ("B H T D", "B H T E"), strict=False)))
    bias, flags = _masks(found, op, "unidirectional", past)
    _require_wide(found, op, bias, flags)
    heads = {"num_heads": found.size("H"), "scale": found.scale}
    operands = (q, k, v, None, None, bias, *caches)
    attended, *present = op.microsoft.MultiHeadAttention(*operands, outputs=3, **heads, **flags)
    return op.guarded(attended), *present[: len(past)]


@capped_attention.emit("onnx")
@multi_head_attention.emit("onnx")
def _(found, op):
    return _standard(found, op, _cache(op, shared="H"))


multi_head_attention.emit("onnx")(_standard)
capped_attention.emit("onnx")(_standard)


@multi_head_attention.emit("ort-cpu")
def _(found, op):
    return _standard(found, op, _cache(op, shared="H"), hidden_rows=False)


@multi_head_attention.emit("ort-cpu")
def _(found, op):
    return _standard(found, op, hidden_rows=False)


@multi_head_attention.emit("ort-cpu")
def _(found, op):
    return _multi_head(found, op, _cache(op))


multi_head_attention.emit("ort-cpu", "ort-cuda")(_multi_head)


@self_attention.emit("ort-cpu", "ort-cuda")
def _(found, op):
    found.require(found.scale != 0.0, "the kernel reads a scale of 0 as none given")
    weights = op.packed(found.wq, found.wk, found.wv, axis=1)
    biases = op.packed(found.bq, found.bk, found.bv, axis=0, absent=(found.wq, found.wk, found.wv))
    heads = {"num_heads": found.size("H"), "scale": found.scale}
    if found.wq.shape[1] != found.wv.shape[1]:
        heads["qkv_hidden_sizes"] = [capture.shape[1] for capture in (found.wq, found.wk, found.wv)]
    bias, flags = _masks(found, op, "unidirectional")
    _require_wide(found, op, bias, flags)
    return op.guarded(op.microsoft.Attention(found.x, weights, biases, None, None, bias, **heads, **flags))
