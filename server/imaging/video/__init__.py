"""Videos: headers, and frames decoded from files. Decoding runs in child processes only."""
