"""Execution: devices, compilation, CUDA graphs, transfers, memory and native code."""
