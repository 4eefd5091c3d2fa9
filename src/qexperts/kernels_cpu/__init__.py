"""Kernels of backend `cpu`, written and compiled by llvmlite. Nothing here checks user input."""
