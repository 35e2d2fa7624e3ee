"""Global sparse momentum (Ding et al. 2019)."""
