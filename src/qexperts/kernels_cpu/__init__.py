"""Kernels of backend `cpu`, compiled from Python by Numba and LLVM. Nothing here checks user input."""
