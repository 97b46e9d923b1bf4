"""Keeps what the vision encoder computed, in host memory, on disk and in a store of many replicas.

    scheduler (index, tiers)  --- names of bytes in the arena --->  workers (tensors)

The engine's scheduler owns the index. Bytes lie in an arena of shared memory, which the workers
fill from their encoder cache and read back into it. Threads move them between the arena and the
lower tiers, so that no step of the engine waits for a disk or a network.
"""
