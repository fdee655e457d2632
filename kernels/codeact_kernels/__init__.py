"""Triton kernels of codeact. They need the extra ``gpu``; ``codeact`` imports them when a tensor is on a device."""
