"""From a word in its context to the features, heads and neurons that write what it means."""
