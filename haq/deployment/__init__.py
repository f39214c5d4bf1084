"""From a quantized network to a file that runs: the graph, the program of integers, and the formats."""
