"""What a model, a GPU and a kind of request add up to: memory, times, throughput and cost. Pure
arithmetic on a `ModelShape`; nothing here imports vLLM."""
