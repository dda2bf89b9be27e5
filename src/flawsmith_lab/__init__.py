"""Research beside the product: studies, benchmarks, fidelity. Needs the extras `train` and `lab`; not in the wheel."""
