"""The shortest complete use: declare an MLP, run it forward and backward, compare with eager PyTorch.

    python examples/quickstart.py

Runs the generated kernels on a GPU, and PyTorch's own operations on a CPU. With TRITON_INTERPRET=1 a CPU interprets the
generated kernels.
"""

import torch

import mlpdsl


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = mlpdsl.MLPSpec(dims=(256, 512, 256), activation="gelu", bias=True)
    mlp = mlpdsl.MLP(spec, device=device)

    x = torch.randn(64, spec.d_in, device=device, requires_grad=True)
    y = mlp(x)
    y.sum().backward()

    expected = mlpdsl.reference(spec)(x, *mlp.parameters())
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    print(f"{spec.short_name} on {device}")
    print(f"y   largest difference from eager PyTorch: {(y - expected).abs().max():.1e}")
    print(f"dx  largest difference from eager PyTorch: {(x.grad - expected_grad).abs().max():.1e}")


if __name__ == "__main__":
    main()
