"""Generated kernels under NVIDIA's compute-sanitizer: `python -m tests.sanitizer`."""
