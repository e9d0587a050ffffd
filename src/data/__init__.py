"""What images there are: one module a source, and the random changes of training."""
