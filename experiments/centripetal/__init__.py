"""Centripetal SGD: units of a cluster become equal (Ding et al. 2019)."""
