"""Try-and-learn pruning (Huang et al. 2018)."""
