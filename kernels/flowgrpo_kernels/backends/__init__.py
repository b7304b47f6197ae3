"""Backends: the implementations of an op, and the choice between them.

    dispatch.py         the table of ops, their registration with torch, the choice of a backend
    triton.py           Triton: availability, launching, device functions that the kernels share
    compiled.py         the same kernels, compiled ahead: choice of an image, loading, launching
    images.py           the packs of them in ../images: finding, checking and reading
    cuda_driver.py      libcuda.so.1 through ctypes
    native.py           the compiled CPU library: one function per op
    native_library.py   finding, checking and opening that library
    info.py             backend_info(): what runs where, and why

The plain PyTorch backend is ../reference.py (and ../blocks/reference.py).
"""
