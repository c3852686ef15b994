"""Weight formats: how a weight is quantized, stored, described, and multiplied in the graph. One module per format."""
