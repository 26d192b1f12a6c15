"""The oracle: what an MLP and its gradients are in float64, and how far a correct kernel may be from it.

`oracle.forward` and `oracle.backward` give values with an error bound each, `oracle.check` compares; `functions` holds
the activations' own float64 definitions, written independently of the code generator.
"""
