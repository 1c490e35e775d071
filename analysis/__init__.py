"""Tables and figures from run folders. Reads files only; knows nothing of training."""
