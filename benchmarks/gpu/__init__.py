"""One prepared run for a machine with a CUDA device: is it right, does it resume, how fast is it.

``python -m benchmarks.gpu`` runs three parts, each in processes of its own, and writes what it
found; see README.md in the folder above.
"""
