"""Trained rank pruning (Xu et al. 2018, 2020) and factors of low rank."""
