"""Caches outputs of the vision encoder in host memory, on disk and in a store shared by replicas.

    scheduler (index, tiers)  --- places in the arena --->  workers (tensors)

The engine's scheduler process has the index. Embeddings are in an arena of shared memory; workers
copy them from their encoder cache into the arena and back. Threads move them between the arena and
the lower tiers, so no step of the engine waits for a disk or a network.
"""
