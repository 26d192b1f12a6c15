"""Why an operation that torch runs has no scalar printing, and what to write instead."""

from __future__ import annotations

_KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "a reduction over elements, and a kernel sees one tile": (
        ("sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "norm", "linalg_vector_norm", "_softmax", "softmax",
         "_log_softmax", "logsumexp", "cumsum", "cumprod", "sort", "topk", "kthvalue", "median", "argmax", "argmin", "any", "all",
         "native_layer_norm", "_fused_rms_norm", "native_group_norm", "native_batch_norm", "var_mean", "std_mean", "mm", "matmul",
         "bmm", "addmm", "dot", "count_nonzero", "unique", "histc", "logcumsumexp", "cummax", "cummin"),
        "Reduce outside the MLP, and pass the result as an operand of an epilogue."),
    "a shape change": (
        ("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "cat", "stack", "slice", "select", "index",
         "unsqueeze", "squeeze", "chunk", "split", "split_with_sizes", "unbind", "flip", "roll", "gather", "scatter", "repeat",
         "as_strided", "unfold", "pad", "constant_pad_nd", "glu", "tril", "triu", "diag", "arange", "index_select", "narrow",
         "movedim", "flatten", "unflatten", "slice_scatter", "select_scatter", "index_put", "masked_select", "nonzero"),
        "Each element is mapped on its own. For packed gate and up write gated=True and a function of (gate, up)."),
    "randomness": (
        ("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "bernoulli", "native_dropout", "normal", "uniform",
         "multinomial", "exponential", "random", "poisson", "randperm", "cauchy", "geometric"),
        "Draw the mask outside, and pass it as an operand of an epilogue (kind 'tile', or 'row' for stochastic depth)."),
    "an integer or bit operation": (
        ("bitwise_xor", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "bitwise_left_shift", "bitwise_right_shift",
         "frexp", "ldexp", "nextafter", "signbit", "gcd", "lcm"),
        "Only real arithmetic is printed."),
    "complex arithmetic": (
        ("_conj", "complex", "view_as_real", "view_as_complex", "real", "imag", "angle", "polar", "_conj_physical", "conj"),
        "Only real arithmetic is printed."),
}  # fmt: skip


def reason(name: str, overload: str) -> tuple[str, str]:
    """Why `aten.<name>` is refused, and the next step."""
    if name == "view" and overload == "dtype":
        return "an integer or bit operation (aten.view to another type)", "Only real arithmetic is printed."
    plain = name.rstrip("_") or name
    for kind, (names, step) in _KINDS.items():
        if name in names or plain in names:
            return f"{kind} (aten.{name})", step
    step = "Write it in other operations, or give Triton's text: mlpdsl.activation(fn, triton=(value, derivative))."
    return f"torch recorded aten.{name}, which has no scalar printing", step
