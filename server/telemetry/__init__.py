"""What is known of one request: where its time goes, what it cost, how it ended."""
