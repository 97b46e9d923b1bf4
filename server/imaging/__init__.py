"""From encoded bytes to model features, in supervised child processes."""
