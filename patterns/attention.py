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
    q="B S (H D)", k="B T (H|1 D)", v="B T (H|1 E)",
    factor=optional("B|1 H|1 S|1"), sink="H", bias=rest("B H S T"), scale=scalar(),
)  # fmt: skip
def sink_attention(q, k, v, factor, sink, bias, scale):
    """Attention over heads, each with a learned score beside those of the keys (OpenAI 2025, gpt-oss, section 2.2).

    It takes its share of the softmax and has no value: a head may attend to nothing.
    """
    q, k = axes(q, "B S (H D) -> B H S D"), axes(k, "B T (H D) -> B H D T")
    v, factor = axes(v, "B T (H E) -> B H T E"), axes(factor, "B H S -> B H S 1")
    scores = scale * factor * (q @ k)
    weights = softmax(scores + bias, beside=axes(sink, "H -> H 1 1"))
    return axes(weights @ v, "B H S E -> B S (H E)")


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


def _grouped(found, op, past=()):
    """GroupQueryAttention: heads of keys and values that several of queries read, as they are.

    Without a cache it is causal or not; behind one it is causal, and told how many of the queries are new.
    """
    cap, sink = getattr(found, "cap", None), getattr(found, "sink", None)
    scale = found.scale if cap is None else found.scale * cap
    found.require(scale != 0.0, "the kernel reads a scale of 0 as none given")
    found.require_one_dtype()
    caches = zip(past, ("B H T D", "B H T E"), strict=False)
    shared, (k, v, *caches) = op.unrepeated("H", (found.k, "B T (H D)"), (found.v, "B T (H E)"), *caches)
    heads = {"num_heads": found.size("H"), "kv_num_heads": shared, "scale": scale}
    alone = shared == heads["num_heads"] and cap is None and sink is None
    found.require(not alone, "all heads have keys of their own", kind="gain")
    (batch, queries, width), (_, new, _) = found.q.shape, found.k.shape
    alike = found.k.shape[2] == found.v.shape[2]
    found.require(alike, "the kernel takes keys and values of one size", kind="kernel")
    found.require(new == queries, "the kernel takes as many new keys as queries", kind="kernel")
    eights = width % (8 * heads["num_heads"]) == 0
    found.require(eights, "the kernel takes head sizes that are multiples of 8", kind="kernel")
    bias, flags = _masks(found, op, "causal", past)
    found.require(bool(flags) or not past, "behind a cache the kernel is causal, and nothing else is proved")
    if cap is not None:
        heads["softcap"] = abs(cap)
    if not flags:
        heads["causal"] = 0
    keys = new + (past[0].shape[1] if past else 0)
    lengths = op.filled(keys - 1, batch), op.filled(keys, 1)
    rotary = quantized = normed = (None, None)
    beside = (*rotary, None, bias, op.arranged(sink), *quantized, *normed, op.filled(queries, batch) if past else None)
    operands = (_queries(found, op), k, v, *(caches or (None, None)), *lengths, *beside)
    attended, *present = op.microsoft.GroupQueryAttention(*operands, outputs=3, **heads)
    return op.guarded(attended), *present[: len(past)]


def _side_by_side(found, op, past=()):
    """MultiHeadAttention over the heads of keys: the queries that share one are rows beside each other, (S G)."""
    found.require(found.scale != 0.0, "the kernel reads a scale of 0 as none given")
    found.require_one_dtype()
    caches = zip(past, ("B H T D", "B H T E"), strict=False)
    heads, (k, v, *caches) = op.unrepeated("H", (found.k, "B T (H D)"), (found.v, "B T (H E)"), *caches)
    often = found.size("H") // heads
    found.require(often > 1, "all heads have keys of their own", kind="gain")
    found.require(found.factor is None, "scores have a factor by head")
    alike = found.k.shape[2] == found.v.shape[2]
    found.require(alike or not past, "the kernel takes no cache of keys and values of different sizes")
    (batch, queries, _), bias = found.q.shape, op.additive(found.bias)
    if bias is not None:
        found.require(op.shape(bias)[1] == 1, "what is added differs by head")
        bias = op.rearranged(bias, "B H S T -> B H (S G) T", G=often)
    q = op.placed(found.q.laid(found.q.cut("H", K=heads, G=often), "B (S G) (K D)"), found.dtype)
    operands = (q, k, v, None, None, bias, *caches)
    made, *present = op.microsoft.MultiHeadAttention(*operands, outputs=3, num_heads=heads, scale=found.scale)
    sizes = {"B": batch, "S": queries, "G": often, "K": heads, "E": found.size("E")}
    attended = op.rearranged(made, "B (S G) (K E) -> B S (K G E)", **sizes)
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


@sink_attention.emit("ort-cpu")
@capped_attention.emit("ort-cpu")
@multi_head_attention.emit("ort-cpu")
def _(found, op):
    return _grouped(found, op, _cache(op, shared="H"))


for _pattern in (multi_head_attention, capped_attention, sink_attention):
    _pattern.emit("ort-cpu")(_grouped)


@multi_head_attention.emit("ort-cpu")
def _(found, op):
    return _side_by_side(found, op, _cache(op, shared="H"))


@multi_head_attention.emit("ort-cpu")
def _(found, op):
    return _multi_head(found, op, _cache(op))


multi_head_attention.emit("ort-cpu")(_side_by_side)
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
